"""VILA's folders in Hugging Face layout, and VILA for transformers."""
