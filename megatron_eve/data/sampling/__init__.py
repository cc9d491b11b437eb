"""Which samples a step takes, in which order and in which packs."""
