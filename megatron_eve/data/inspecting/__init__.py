"""Inspect a dataset: drawings of rows, a page of statistics, and a full check. See tools/inspect_data.py."""
