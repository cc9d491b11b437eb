"""Curation: from shards of published downloads to the rows that are worth training on (`tools/curate.py`)."""
