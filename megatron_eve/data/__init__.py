"""Data: pictures and conversations to indexed datasets, and indexed datasets to batches.

Nothing is imported here: texts, sources, preprocessing and the format on disk stay usable without torch, and
megatron-core (which takes seconds) is loaded only when the first row of a dataset is read.
"""
