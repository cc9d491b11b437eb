"""Curation: from published downloads to the rows that a model is trained on."""
