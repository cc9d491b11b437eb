"""Datasets on disk: manifest, reader, writer, merged datasets."""
