"""Models on megatron-core: front ends (EVE now; VILA and VILA-U later), one decoder, one class the trainer knows."""
