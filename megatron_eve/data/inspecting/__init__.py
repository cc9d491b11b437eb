"""Look at a dataset: rows as pictures, its figures on a page, and a check of every byte. See tools/inspect_data.py."""
