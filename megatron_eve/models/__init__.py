"""Models on megatron-core: one decoder and one class that the trainer knows; a folder for each family."""
