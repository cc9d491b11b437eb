"""The language decoder on megatron-core: layer specifications, packed attention in torch, packed parameters."""
