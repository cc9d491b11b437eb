"""What this project calls of TransformerEngine is there in the version that it pins, read from the wheel.

TransformerEngine imports on GPU machines only, so its Python sources are parsed.
"""

from __future__ import annotations

import ast
import os
import re
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@cache
def pinned() -> str:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'"transformer-engine==([\d.]+)"', text)
    assert found is not None
    return found[1]


def source(name: str) -> ast.Module:
    """A module of the pinned wheel, by its path below transformer_engine/pytorch; skips where there is no wheel."""
    outside = os.environ.get("GOLDEN_DIR")
    wheels = Path(outside or "/nowhere").glob(f"gpu/wheels/transformer_engine-{pinned()}-*.whl")
    wheel = next(wheels, None)
    if wheel is None:
        pytest.skip(
            f"no wheel of TransformerEngine {pinned()} below GOLDEN_DIR/gpu/wheels ({outside or 'not set'})"
        )
    with zipfile.ZipFile(wheel) as files:
        return ast.parse(files.read(f"transformer_engine/pytorch/{name}.py"))


def find(tree: ast.AST, name: str) -> ast.AST:
    """A function or class by name, a method as Class.method."""
    for part in name.split("."):
        tree = next(
            node
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part
        )
    return tree


def parameters(function: ast.AST) -> list[str]:
    assert isinstance(function, ast.FunctionDef)
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def test_buffers_for_overlap_are_made_as_told() -> None:
    """`prepare_kernels` and `forget_kernels`."""
    base = source("module/base")
    asked = {"shape", "tp_size", "quantization_modes", "dtype", "bootstrap_backend"}
    assert asked <= set(parameters(find(base, "initialize_ub")))
    assert parameters(find(base, "destroy_ub")) == []
    modes = {
        node.id for node in ast.walk(find(base, "UserBufferQuantizationMode")) if isinstance(node, ast.Name)
    }
    assert {"NONE", "FP8"} <= modes
    exported = {
        alias.name
        for node in ast.walk(source("__init__"))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"initialize_ub", "destroy_ub", "UserBufferQuantizationMode"} <= exported


def test_fp8_state_can_be_forgotten() -> None:
    imported = [node for node in ast.walk(source("fp8")) if isinstance(node, ast.ImportFrom)]
    assert "FP8GlobalStateManager" in {alias.name for node in imported for alias in node.names}
    assert parameters(find(source("quantization"), "FP8GlobalStateManager.reset")) == ["cls"]


def test_scales_can_be_taken_down_and_put_back() -> None:
    """`snapshot_fp8_state`: None, for a layer that has none yet, puts back what it begins with."""
    base = source("module/base")
    assert parameters(find(base, "TransformerEngineBaseModule.get_fp8_meta_tensors")) == ["self"]
    reset = find(base, "TransformerEngineBaseModule.reset_fp8_meta_tensors")
    assert parameters(reset) == ["self", "fp8_meta_tensors"]


@pytest.mark.parametrize(
    ("module", "layer"), [("module/linear", "Linear"), ("module/layernorm_linear", "LayerNormLinear")]
)
def test_layers_ask_at_each_call_whether_gradients_are_fused(module: str, layer: str) -> None:
    """`fuse_weight_gradients` sets what the constructor set, after it."""

    def uses(method: str, context: type[ast.expr_context]) -> bool:
        return any(
            isinstance(node, ast.Attribute)
            and node.attr == "fuse_wgrad_accumulation"
            and isinstance(node.ctx, context)
            for node in ast.walk(find(tree, f"{layer}.{method}"))
        )

    tree = source(module)
    assert uses("__init__", ast.Store) and uses("forward", ast.Load)


def test_attention_takes_what_a_pack_is_described_by() -> None:
    """The fields of `PackedParams` that megatron-core hands on."""
    names = {"qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"}
    forward = find(
        source("attention/dot_product_attention/dot_product_attention"), "DotProductAttention.forward"
    )
    assert names <= set(parameters(forward))


def test_the_fused_loss_may_be_told_not_to_wait() -> None:
    """In the order in which megatron-core gives the arguments."""
    found = parameters(find(source("cross_entropy"), "CrossEntropyFunction.forward"))
    assert found[-1] == "is_cg_capturable" and found[1:3] == ["inp", "target"]
