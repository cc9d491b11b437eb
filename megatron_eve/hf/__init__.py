"""The models for transformers: importing this package registers them, so that no code from a model folder has to run.

    import megatron_eve.hf
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained("eve-7b-hf")
    model = AutoModelForCausalLM.from_pretrained("eve-7b-hf")

It holds the classes of every family, also of its towers that make codes of pictures, which are in
`megatron_eve/models/<family>/hf/`.
"""

from megatron_eve.models.registry import code_families, families, find_image_codes

for _family in families():
    globals().update(_family.hugging_face().register())
for _name in code_families():
    if (_folders := find_image_codes(_name).folders) is not None:
        globals().update(_folders.register())
