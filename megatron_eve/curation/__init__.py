"""Curation: from parquet shards of records to fewer and better ones, in stages (docs/curation.md).

A stage reads the shards and the tables of earlier stages, and writes small tables; `build` writes the curated shards.
"""
