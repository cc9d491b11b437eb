"""From rows of a source to a dataset on disk."""
