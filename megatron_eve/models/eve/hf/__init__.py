"""EVE's folders in Hugging Face layout, and EVE for transformers.

The modules `*_eve.py` are what an exported folder carries for `trust_remote_code=True`: they import nothing of this
project but each other.
"""
