"""The models for transformers: importing this package registers them, so that no code from a model folder has to run.

    import megatron_eve.hf
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained("eve-7b-hf")
    model = AutoModelForCausalLM.from_pretrained("eve-7b-hf")

It holds the classes of every family, which are in `megatron_eve/models/<family>/hf/`.
"""

from megatron_eve.models.registry import families

for _family in families():
    globals().update(_family.hugging_face().register())
