"""megatron_eve: pretraining of encoder-free vision-language models (EVE) on megatron-core."""

__version__ = "0.1.0"
