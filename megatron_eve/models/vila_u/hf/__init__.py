"""VILA-U's tower for transformers.

`configuration_vila_u_tower.py`, `modeling_vila_u_tower.py` and `image_processing_vila_u.py` are what an exported folder
carries for `trust_remote_code=True`: they import nothing of this project but each other.
"""
