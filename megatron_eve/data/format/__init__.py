"""Datasets on disk: the manifest, the reader, the writer, several as one."""
