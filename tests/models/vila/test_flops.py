"""FLOPs of tower and projector: by hand, and against torch's own counter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest

from megatron_eve.config import ModelConfig, RunConfig
from megatron_eve.models.family import Preset
from megatron_eve.models.model_parts import Work
from megatron_eve.models.registry import find_family
from megatron_eve.models.vila.config import PRESETS, ProjectorType, VILAConfig
from megatron_eve.models.vila.flops import image_work, projector_flops, tower_flops, vila_flops
from tests.ranks import RankPool

# 3 x 3 patches of 2 x 2 pixels and a class token; hidden state 1 of the three (one layer of two is run).
TOWER = VILAConfig(
    image_size=6,
    vision_patch_size=2,
    vision_hidden_size=4,
    vision_num_layers=2,
    vision_num_attention_heads=2,
    vision_ffn_hidden_size=5,
    vision_select_layer=-2,
)
# A patch of 12 values to 4 costs 2*12*4 = 96; nine: 864.
CONVOLUTION = 864
# Ten tokens: four matrices 4 -> 4 (32 each), 4 -> 5 and 5 -> 4 (40 each): 208; * 10 = 2080. 100 pairs meet for 8 and
# take their value for 8: 1600.
LAYER = 3680


def test_a_tower_by_hand() -> None:
    assert tower_flops(TOWER) == CONVOLUTION + LAYER == 4544
    # Trained: the convolution's weight gradient, and three times the layer.
    assert tower_flops(replace(TOWER, freeze_ViT=False)) == 2 * CONVOLUTION + 3 * LAYER == 12768
    # All layers, which the hidden state behind the last one needs; none, for hidden state 0.
    assert tower_flops(replace(TOWER, vision_select_layer=-1)) == CONVOLUTION + 2 * LAYER
    assert tower_flops(replace(TOWER, vision_select_layer=0)) == CONVOLUTION
    # Without a class token 9 tokens and 81 pairs: 9 * 208 + 81 * 16 = 3168.
    assert tower_flops(replace(TOWER, vision_model_type="siglip")) == CONVOLUTION + 3168


# Rows of a picture, and FLOPs of one of them in each matrix, to a decoder that is 7 wide; 4 -> 7 costs 56, 7 -> 7 98.
PROJECTORS = {
    "linear": (9, 56),
    "mlp2x_gelu": (9, 56, 98),
    "mlp3x_gelu": (9, 56, 98, 98),
    # 3 x 3 features are padded to 4 x 4: four blocks of 16 values; 16 -> 7 costs 224.
    "mlp_downsample": (4, 224, 98),
    "mlp_downsample_2x2_fix": (4, 224, 98),
    # One block of 36 values: 36 -> 12 costs 864, 12 -> 7 168.
    "mlp_downsample_3x3_fix": (1, 864, 168, 98),
}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_projectors_by_hand(kind: str) -> None:
    vision = replace(TOWER, projector_type=kind)  # type: ignore[arg-type]
    rows, first, *others = PROJECTORS[kind]
    # Behind a frozen tower the input of a matrix needs no gradient, that of a norm which trains does.
    times = 3 if "downsample" in kind else 2
    assert projector_flops(vision, 7) == rows * (times * first + 3 * sum(others))
    assert projector_flops(replace(vision, freeze_ViT=False), 7) == rows * 3 * (first + sum(others))


def test_queries_by_hand() -> None:
    # Two queries, nine features, 4 wide; a matrix 4 -> 4 costs 32, 4 -> 16 and back 128 each, a pair 16. Among queries
    # 2 * 4 * 32 + 4 * 16 = 320; to the features 2 * 2 * 32 + 9 * 2 * 32 + 18 * 16 = 992; MLP 2 * 256 = 512. Two blocks:
    # 3648. Then 2 * 56 = 112.
    vision = replace(TOWER, projector_type="qformer", qformer_num_queries=2)
    assert projector_flops(vision, 7) == 3 * 3760


def test_a_step_by_hand() -> None:
    """Pictures count, however many of their rows a sample has room for."""
    model = ModelConfig(num_layers=2, hidden_size=7, ffn_hidden_size=3, num_attention_heads=1, vocab_size=5)
    work = Work(tokens=60, attended=400, labels=9, images=5, merged_patches=45, image_rows=40)
    front_end, objectives = vila_flops(Preset(model, TOWER), work)
    # mlp2x_gelu: 9 * (2*56 + 3*98) = 3654.
    assert front_end == {"tower": 5 * 4544, "projector": 5 * 3654} and objectives == {}
    # A token costs 4 * 98 in attention's matrices and 3 * 42 in the MLP's: 518; * 2 layers * 3, or * 2.
    assert image_work(Preset(model, TOWER), decoder_trains=True) == pytest.approx(8198 / 3108)
    assert image_work(Preset(model, TOWER), decoder_trains=False) == pytest.approx(8198 / 2072)


def test_published_towers() -> None:
    """CLIP ViT-L/14-336 without its last layer is about 0.36 TFLOP a picture, SigLIP SO400M/14-384 0.65."""
    assert tower_flops(PRESETS["vila_7b"].vision) == pytest.approx(0.366e12, rel=0.01)
    assert tower_flops(PRESETS["vila15_8b"].vision) == pytest.approx(0.647e12, rel=0.05)


def counted(cases: Sequence[RunConfig], pictures: int) -> list[int]:
    """Runs on a rank: torch's count of a forward and backward pass of each front end over pictures."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.model_parts import VisualInputs
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.stages import stage_of

    found = []
    with model_parallel(cases[0]):
        for config in cases:
            module: Any = find_family(config.family).front_end(config, transformer_config(config))
            for name, parameter in module.named_parameters():
                if not stage_of(config).trains(f"vision_model.{name}"):
                    parameter.requires_grad_(False)
            side = config.vision.image_size
            pixels = torch.randint(0, 256, (pictures, side, side, 3), dtype=torch.uint8)
            inputs = VisualInputs({"tower": pixels}, torch.ones(pictures, 2, dtype=torch.int64))
            counter = FlopCounterMode(display=False)
            with (
                counter,
                sdpa_kernel(SDPBackend.MATH),
            ):  # the only kernel whose products the counter sees on CPUs
                module(inputs).sum().backward()
            found.append(counter.get_total_flops())
    return found


@pytest.mark.distributed
def test_as_torch_counts_the_modules(ranks: RankPool) -> None:
    """Every projector behind both towers, frozen and trained."""
    cases = [
        RunConfig(
            family="vila",
            model=ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=8),
            vision=replace(
                TOWER, projector_type=kind, vision_model_type=tower, freeze_ViT=frozen, qformer_num_queries=3
            ),
        )
        for kind, tower, frozen in itertools.product(
            get_args(ProjectorType), ("clip", "siglip"), (True, False)
        )
    ]
    work = Work(tokens=0, attended=0, labels=0, images=3, merged_patches=0, image_rows=0)
    expected = []
    for case in cases:
        kind, frozen = case.vision.projector_type, case.vision.freeze_ViT
        flops = sum(vila_flops(case, work).front_end.values())
        # megatron-core's linear layers compute the gradient of their input whether it is wanted or not: 3 * 9 features
        # 4 -> 32 (256). What the model needs is counted, not that.
        expected.append(flops + 27 * 256 * (frozen and kind in ("linear", "mlp2x_gelu", "mlp3x_gelu")))
    assert ranks.run(1, counted, cases, 3) == [expected]
