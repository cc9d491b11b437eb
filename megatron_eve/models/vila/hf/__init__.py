"""VILA's folders in Hugging Face layout, and VILA for transformers.

`configuration_vila.py` and `modeling_vila.py` are what an exported folder carries for `trust_remote_code=True`: they
import nothing of this project but each other.
"""
