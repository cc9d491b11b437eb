"""Data: pictures and conversations to indexed datasets, and indexed datasets to batches.

Nothing is imported here: `geometry`, `conversation` and `tokenizer` stay usable without torch, and
`indexed` loads megatron-core (which takes seconds) only when a dataset is written or opened.
"""
