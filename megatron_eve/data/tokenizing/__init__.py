"""Images of a dataset to codes; `tools/tokenize_images.py` is the command."""
