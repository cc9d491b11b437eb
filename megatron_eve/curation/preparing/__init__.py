"""Preparers: from a published download to parquet shards of records (`data/schema.py`), pictures inside."""
