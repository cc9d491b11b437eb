"""Errors of precision and kernel settings that need no GPU to find; `models/kernels.py` checks the machine."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.config.schema import RunConfig

# TransformerEngine's matrix products in FP8 need the last dimension of both operands to be a multiple of this.
_FP8_WIDTH = 16
# Size of a block in its blockwise recipe.
_BLOCK = 128


def kernel_errors(config: RunConfig) -> Iterator[str]:
    """Errors of precision and kernel settings, one line each, with flag and remedy."""
    training = config.training
    if config.parallel.tp_comm_overlap:
        yield from _overlap(config)
    if training.fp8_format is not None:
        yield from _fp8(config)
    elif training.fp8_recipe != "delayed":
        yield f"--fp8-recipe {training.fp8_recipe}: only used with --fp8-format; add that, or leave it out"
    if training.cross_entropy_loss_fusion:
        if not training.bf16:
            yield (
                "--cross-entropy-loss-fusion: rounds the gradient of the logits to bfloat16; add --bf16, or leave "
                "it out"
            )
    elif training.cross_entropy_fusion_impl != "native":
        yield "--cross-entropy-fusion-impl te: only used with --cross-entropy-loss-fusion; add that, or leave it out"


def _overlap(config: RunConfig) -> Iterator[str]:
    parallel, training, flag = config.parallel, config.training, "--tp-comm-overlap"
    if not parallel.sequence_parallel:
        yield f"{flag}: overlaps what --sequence-parallel gathers and scatters; add that, or leave it out"
    if parallel.variable_seq_lengths:
        yield f"{flag}: its buffers have one size, for packs of --seq-length; leave --variable-seq-lengths out"
    if not training.bf16:
        yield f"{flag}: its buffers are in bfloat16; add --bf16"
    if training.transformer_impl == "local":
        yield f"{flag}: torch's layers have no overlap; leave --transformer-impl out"
    if training.fp8_format is not None and training.fp8_recipe == "blockwise":
        yield f"{flag}: has no buffers for --fp8-recipe blockwise; use delayed or tensorwise"


def _fp8(config: RunConfig) -> Iterator[str]:
    training, model = config.training, config.model
    flag = f"--fp8-format {training.fp8_format}"
    if training.transformer_impl == "local":
        yield f"{flag}: torch's layers have no FP8; leave --transformer-impl out, or train with --bf16 alone"
    if not training.bf16:
        yield f"{flag}: what is not in FP8 is in bfloat16; add --bf16"
    tensor = config.parallel.tensor_model_parallel_size
    if min(tensor, model.num_attention_heads, model.num_query_groups or 1) < 1:
        return  # reported by another check
    head = model.hidden_size // model.num_attention_heads
    groups = model.num_query_groups or model.num_attention_heads
    widths = {
        "--hidden-size": model.hidden_size,
        "--num-attention-heads x head dimension": head * model.num_attention_heads,
        "--num-query-groups x head dimension": head * groups,
        "--ffn-hidden-size": model.ffn_hidden_size,
    }
    for name, width in widths.items():
        # The width of a layer's input is never split; the others are, over tensor-parallel ranks.
        ranks = 1 if name == "--hidden-size" else tensor
        if width % (ranks * _FP8_WIDTH):
            yield (
                f"{flag}: matrices of {name} {width} on {ranks} tensor-parallel ranks are not a multiple of "
                f"{_FP8_WIDTH} wide; lower --tensor-model-parallel-size, or train with --bf16 alone"
            )
    if (
        training.fp8_recipe == "blockwise"
        and config.parallel.sequence_parallel
        and model.hidden_size % _BLOCK
    ):
        yield (
            f"--fp8-recipe blockwise: with --sequence-parallel rows are gathered in blocks of {_BLOCK}, of which "
            f"--hidden-size {model.hidden_size} is no multiple; use tensorwise"
        )
