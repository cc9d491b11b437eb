"""VILA-U (arXiv 2409.04429): one tower that turns pictures into codes, and codes into pictures."""
