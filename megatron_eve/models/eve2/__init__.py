"""EVE v2: an expert for each modality, and pictures of any resolution (arXiv 2502.06788)."""
