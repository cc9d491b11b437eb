"""Model FLOPs: by hand, against torch's own counter over plain modules in published form, and on a step's manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from megatron_eve.config import PRESETS, ModelConfig, RunConfig, TrainingConfig
from megatron_eve.data.batch import expand
from megatron_eve.data.mock import MockDataset
from megatron_eve.data.text.conversation import IGNORE_INDEX
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.flops import TeacherSizes, eve_flops
from megatron_eve.models.eve.hf.modeling_eve import EVEVisionTower
from megatron_eve.models.family import Preset
from megatron_eve.models.model_parts import Work
from megatron_eve.training.monitoring.flops import decoder_flops, step_work
from megatron_eve.training.monitoring.flops import model_flops as flops_of_a_run
from tests.data.helpers import planner


def model_flops(
    sizes: Preset, work: Work, *, decoder_trains: bool, teacher: TeacherSizes | None
) -> dict[str, float]:
    """All parts, in the order of `flops_of_a_run`, with a teacher of any sizes."""
    eve = eve_flops(sizes, work, teacher)
    decoder = decoder_flops(sizes.model, work, decoder_trains=decoder_trains)
    return {part: float(n) for part, n in {**eve.front_end, **decoder, **eve.objectives}.items()}


# --- by hand ---------------------------------------------------------------------------------------------------------

HAND_SIZES = Preset(
    ModelConfig(
        num_layers=2, hidden_size=4, ffn_hidden_size=3, num_attention_heads=2, num_query_groups=1, vocab_size=5,
    ),
    EVEConfig(
        patch_embedding_size=2, patch_embedding_heads=1, image_size=28, teacher_size=14, teacher_hidden_size=3,
        aligning_heads=1, tap_interval=1,
    ),
)  # fmt: skip
# An image of 2 x 2 merged patches takes 1 + 2 * 3 = 7 rows. One sample is that and 3 words, another 3 words alone:
# 10 + 3 tokens, 55 + 6 pairs; two of each sample's words are labels.
HAND_WORK = Work(tokens=13, attended=61, labels=4, images=1, merged_patches=4, image_rows=7)
HAND_TEACHER = TeacherSizes(layers=2, hidden_size=3, ffn_hidden_size=6, tokens=5)

HAND_PARTS = {
    # Convolution: 16 patches of 588 values to 2: 16 * 2*588*2 = 37632, and again for the gradient of its weight: 75264.
    # A matrix 2 -> 2 costs 8, 2 -> 4 (key and value) 16; a query meets a key for 2*2 = 4 and takes its value for 4.
    # Local: query 4*8 = 32, keys and values 16*16 = 256, products 16 * (4 + 4) = 128, output 4*8 = 32: 448.
    # Global: query 8, keys and values 4*16 = 64, products 4 * (4 + 4) = 32, output 8: 112. (448 + 112) * 3 = 1680.
    "patch_embedding": 76944,
    # 7 rows through 2 -> 4 (16) and 4 -> 4 (32): 336; * 3.
    "projector": 1008,
    # Query and output 4 -> 4 (32 each), key and value 4 -> 2 (16 each), three of 4 x 3 (24 each): 168 for a token and
    # layer; * 13 tokens * 2 layers = 4368; * 3.
    "decoder": 13104,
    # A pair costs 8 for the score and 8 for the value: 61 * 16 * 2 layers = 1952; * 3.
    "attention": 5856,
    # 4 rows of 4 -> 5 (40): 160; * 3.
    "output_layer": 480,
    # Depths 2, 1 and 0 of 4 rows through 4 -> 3 (24): 288; * 3.
    "intermediate_features": 864,
    # 4 rows: 2 keys for 6 + 6 each, 4 -> 3 (24), 3 -> 3 (18): 66; * 4 = 264; * 3.
    "aligning": 792,
    # 4 patches of 588 values to 3: 14112. A layer: 5 tokens through four 3 -> 3 (18 each), 3 -> 6 and 6 -> 3 (36 each),
    # 5 * 144 = 720, and 25 pairs for 6 + 6, 300; two layers 2040. Forward only.
    "teacher": 16152,
}


def test_by_hand() -> None:
    assert model_flops(HAND_SIZES, HAND_WORK, decoder_trains=True, teacher=HAND_TEACHER) == HAND_PARTS


@pytest.mark.parametrize("stage", [1, 2])
def test_of_a_run(stage: int) -> None:
    config = RunConfig(model=HAND_SIZES.model, vision=HAND_SIZES.vision, training=TrainingConfig(stage=stage))
    parts = model_flops(HAND_SIZES, HAND_WORK, decoder_trains=stage == 2, teacher=None)
    assert list(flops_of_a_run(config, HAND_WORK).items()) == list(parts.items())


def test_a_frozen_decoder_by_hand() -> None:
    # The matrices' weight gradients go, 4368 and 160; the products of attention keep all of theirs.
    wanted = HAND_PARTS | {"decoder": 8736, "output_layer": 320}
    assert model_flops(HAND_SIZES, HAND_WORK, decoder_trains=False, teacher=HAND_TEACHER) == wanted


def test_without_a_teacher_nothing_is_aligned() -> None:
    wanted = HAND_PARTS | {"intermediate_features": 0, "aligning": 0, "teacher": 0}
    assert model_flops(HAND_SIZES, HAND_WORK, decoder_trains=True, teacher=None) == wanted


def test_pooling_by_hand() -> None:
    # At twice the image size the four merged patches are one teacher patch: one row is aligned, not four.
    sizes = HAND_SIZES._replace(vision=replace(HAND_SIZES.vision, image_size=56))
    wanted = HAND_PARTS | {"intermediate_features": 216, "aligning": 198}
    assert model_flops(sizes, HAND_WORK, decoder_trains=True, teacher=HAND_TEACHER) == wanted


def test_merged_patches_of_another_image_size() -> None:
    sizes = HAND_SIZES._replace(vision=replace(HAND_SIZES.vision, image_size=56))
    work = replace(HAND_WORK, merged_patches=6)
    with pytest.raises(ValueError, match="6 merged patches do not pool 2 x 2"):
        model_flops(sizes, work, decoder_trains=True, teacher=HAND_TEACHER)
    assert model_flops(sizes, work, decoder_trains=True, teacher=None)["intermediate_features"] == 0


# --- against torch's counter -----------------------------------------------------------------------------------------

# No two sizes alike, so that one in another's place shows.
MODEL = ModelConfig(
    num_layers=4, hidden_size=24, ffn_hidden_size=20, num_attention_heads=6, num_query_groups=2, vocab_size=37,
)  # fmt: skip
VISION = EVEConfig(
    patch_embedding_size=16, patch_embedding_heads=8, image_size=84, teacher_size=42, teacher_hidden_size=28,
    aligning_heads=4, tap_interval=2,
)  # fmt: skip
SIZES = Preset(MODEL, VISION)
GRIDS = [(2, 3), (3, 1)]  # rows and columns of merged patches
LENGTHS = [14, 11, 2]
WORK = Work(tokens=27, attended=105 + 66 + 3, labels=8, images=2, merged_patches=6 + 3, image_rows=9 + 7)


def counted(forward: Callable[[], Tensor], *, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        out = forward()
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


def flops(part: str, work: Work = WORK, sizes: Preset = SIZES, decoder_trains: bool = True) -> float:
    return model_flops(sizes, work, decoder_trains=decoder_trains, teacher=HAND_TEACHER)[part]


def rows(count: int, width: int) -> Tensor:
    """What an earlier part of the model would give: a gradient is wanted."""
    return torch.randn(count, width, requires_grad=True)


class Layer(nn.Module):
    """A Llama layer whose every token asks exactly the tokens up to itself: slow, and no pair too many."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, self.head = model.hidden_size, model.hidden_size // model.num_attention_heads
        self.groups = model.num_query_groups or model.num_attention_heads
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, self.groups * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, model.ffn_hidden_size, bias=False) for _ in range(2))
        self.down = nn.Linear(model.ffn_hidden_size, width, bias=False)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """[T, D] samples end to end -> [T, D]."""
        q, k, v = (y.unflatten(1, (-1, self.head)).split(lengths) for y in (self.q(x), self.k(x), self.v(x)))
        out = []
        for query, key, value in zip(q, k, v, strict=True):
            repeats = query.shape[1] // self.groups
            keys, values = (y.repeat_interleave(repeats, dim=1).transpose(0, 1) for y in (key, value))
            for t in range(len(query)):
                scores = query[t, :, None] @ keys[:, : t + 1].transpose(1, 2)  # (H, 1, t + 1)
                out.append((scores.softmax(-1) @ values[:, : t + 1]).flatten())
        x = x + self.o(torch.stack(out))
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


class PublishedAligning(nn.Module):
    def __init__(self, model: ModelConfig, vision: EVEConfig) -> None:
        super().__init__()
        width, out = model.hidden_size, vision.teacher_hidden_size
        self.heads = vision.aligning_heads
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out, bias=False))
            for _ in vision.tap_depths(model.num_layers)
        )
        self.input_layer, self.output_layer = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, hidden: list[Tensor]) -> Tensor:
        """[n, D] of each depth, last first -> [n, K]."""
        query, *others = [
            project(x).unflatten(1, (self.heads, -1))
            for project, x in zip(self.projections, hidden, strict=True)
        ]
        keys = torch.stack(others, dim=2)  # (n, H, depths, d)
        weights = (query[:, :, None] @ keys.transpose(2, 3)).softmax(-1)
        return self.input_layer(hidden[0]) + self.output_layer((weights @ keys).flatten(1))


def test_patch_embedding_against_the_counter() -> None:
    """The published form, as exported folders have it."""
    layer = EVEVisionTower(VISION.patch_embedding_size)
    patches = torch.randn(sum(4 * h * w for h, w in GRIDS), 3 * 14 * 14)
    assert counted(lambda: layer(patches, GRIDS)) == flops("patch_embedding")


def test_projector_against_the_counter() -> None:
    width = MODEL.hidden_size
    projector = nn.Sequential(
        nn.Linear(VISION.patch_embedding_size, width), nn.GELU(), nn.Linear(width, width)
    )
    x = rows(WORK.image_rows, VISION.patch_embedding_size)
    assert counted(lambda: projector(x)) == flops("projector")


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("groups", [None, 2])
def test_decoder_against_the_counter(groups: int | None, trains: bool) -> None:
    model = replace(MODEL, num_query_groups=groups)
    layers = nn.ModuleList(Layer(model) for _ in range(model.num_layers)).requires_grad_(trains)
    head = nn.Linear(model.hidden_size, model.vocab_size, bias=False).requires_grad_(trains)
    x = rows(WORK.tokens, model.hidden_size)

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y, LENGTHS)
        return head(y[-WORK.labels :])

    parts = model_flops(Preset(model, VISION), WORK, decoder_trains=trains, teacher=None)
    assert counted(run) == parts["decoder"] + parts["attention"] + parts["output_layer"]


@pytest.mark.parametrize("pooling", [1, 2])
def test_aligning_against_the_counter(pooling: int) -> None:
    vision = replace(VISION, image_size=84 * pooling)
    assert vision.tap_depths(MODEL.num_layers) == (4, 2, 0) and vision.pooling == pooling
    h, w = 2 * pooling, 3 * pooling
    layer = PublishedAligning(MODEL, vision)
    hidden = [rows(h * w, MODEL.hidden_size) for _ in range(3)]

    def run() -> Tensor:
        grids = [x.T.unflatten(1, (h, w)) for x in hidden]
        return layer([functional.avg_pool2d(grid, pooling).flatten(1).T for grid in grids])

    work = replace(WORK, merged_patches=h * w)
    assert counted(run) == flops("intermediate_features", work, Preset(MODEL, vision)) + flops(
        "aligning", work, Preset(MODEL, vision)
    )


@pytest.mark.parametrize("trains", [True, False])
def test_decoder_against_transformers(trains: bool) -> None:
    """A Llama that others wrote. Its eager attention computes full squares, so it is asked for n * n pairs."""
    config = transformers.LlamaConfig(
        num_hidden_layers=MODEL.num_layers, hidden_size=MODEL.hidden_size, vocab_size=MODEL.vocab_size,
        intermediate_size=MODEL.ffn_hidden_size, num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_query_groups, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).requires_grad_(trains)
    n, labelled = 13, torch.tensor([4, 7, 12])
    x = torch.randn(1, n, MODEL.hidden_size, requires_grad=True)
    # It makes the angles of the rotary embedding by a matrix product, once.
    angles = counted(lambda: llama.model.rotary_emb(x, torch.arange(n)[None])[0], backward=False)
    work = replace(WORK, tokens=n, attended=n * n, labels=len(labelled))
    parts = model_flops(SIZES, work, decoder_trains=trains, teacher=None)
    whole = counted(lambda: llama(inputs_embeds=x, logits_to_keep=labelled).logits)
    assert whole - angles == parts["decoder"] + parts["attention"] + parts["output_layer"]


def test_teacher_against_transformers() -> None:
    config = transformers.CLIPVisionConfig(
        num_hidden_layers=3, hidden_size=12, intermediate_size=40, num_attention_heads=2, image_size=42,
        patch_size=14, attn_implementation="eager",
    )  # fmt: skip
    tower = transformers.CLIPVisionModel(config)
    images = torch.randn(WORK.images, 3, 42, 42)
    sizes = TeacherSizes(layers=3, hidden_size=12, ffn_hidden_size=40, tokens=10)
    wanted = model_flops(SIZES, WORK, decoder_trains=True, teacher=sizes)["teacher"]
    with torch.no_grad():
        assert counted(lambda: tower(images).last_hidden_state, backward=False) == wanted


# --- what a step holds -----------------------------------------------------------------------------------------------


def test_work_of_a_step_against_its_expanded_samples() -> None:
    dataset = MockDataset(40, vocab_size=512, planner=planner(), seq_length=512, seed=3)
    samples = dataset.samples
    # The mock has one image at most: give a sample its neighbour's as a second one.
    pair = next(
        i
        for i in range(40)
        if samples["num_images"][i] and samples["first_image"][i] + 1 < len(dataset.images)
    )
    second = dataset.image_plan(int(samples["first_image"][pair]) + 1)
    samples["num_images"][pair] = 2
    samples["length"][pair] += second.rows
    ids = [*range(0, 40, 2), *range(1, 35, 2), pair, pair]
    assert 0 in samples["num_images"][ids]

    tokens = attended = labels = images = merged = visual = 0
    for index in ids:
        first, count = int(samples["first_image"][index]), int(samples["num_images"][index])
        plans = [dataset.image_plan(image) for image in range(first, first + count)]
        expanded, targets, starts = expand(*dataset.text(index), plans)
        tokens += len(expanded)
        attended += sum(position + 1 for position in range(len(expanded)))
        labels += int((targets != IGNORE_INDEX).sum())
        images += len(starts)
        merged += sum(p.views["patches"].width // 28 * (p.views["patches"].height // 28) for p in plans)
        visual += int((expanded == 0).sum())  # no word of the mock has the number 0
    wanted = Work(tokens, attended, labels, images, merged, visual)
    assert step_work(dataset, np.array(ids)) == step_work(dataset, ids) == wanted


def test_work_of_no_samples() -> None:
    dataset = MockDataset(4, vocab_size=512, planner=planner(), seq_length=512, seed=3)
    work = step_work(dataset, [])
    assert work == Work(0, 0, 0, 0, 0, 0)
    parts = model_flops(SIZES, work, decoder_trains=True, teacher=HAND_TEACHER)
    assert len(parts) == 8 and set(parts.values()) == {0.0}


# --- at full size ----------------------------------------------------------------------------------------------------

CLIP_L = TeacherSizes(layers=23, hidden_size=1024, ffn_hidden_size=4096, tokens=577)


def test_eve_7b_on_two_samples() -> None:
    # A picture of 640 x 480 has 18 x 24 merged patches and 1 + 18 * 25 = 451 rows; with <s> and 130 words it is 582.
    work = Work(tokens=1164, attended=582 * 583, labels=260, images=2, merged_patches=864, image_rows=902)
    parts = model_flops(PRESETS["eve_7b"], work, decoder_trains=True, teacher=CLIP_L)
    total = sum(parts.values())
    for part, value in parts.items():
        print(f"{part:16} {value:.4e} {value / total:7.2%}")

    # Vicuna-7B has 6,738,415,616 parameters, of which two matrices of 32,000 x 4,096 are not in its layers.
    layers = 6_738_415_616 - 2 * 131_072_000
    assert parts["decoder"] == pytest.approx(6 * layers * 1164, rel=0.01)
    # Exactly: 32 layers of four 4096 x 4096 and three 4096 x 11008.
    assert parts["decoder"] == 6 * 6_476_005_376 * 1164  # 45.2284e12
    # Weights without biases: the projector 20,971,520; the projections of 9 depths 37,748,736; the aligning layer's
    # own two 5,242,880.
    assert parts["projector"] == 6 * 20_971_520 * 902  # 0.1135e12
    assert parts["intermediate_features"] == 6 * 37_748_736 * 864  # 0.1957e12
    assert parts["aligning"] == 6 * 5_242_880 * 864 + 3 * 2 * 2 * 864 * 8 * 1024  # 0.0273e12
    # Attention 0.5337e12, output layer 0.2045e12; patch embedding 0.0083e12 + 0.0653e12.
    # Teacher: 2 images of 0.6936e9 for patches and 23 layers of 14.5207e9 + 1.3637e9: 0.7321e12.
    assert parts["patch_embedding"] == pytest.approx(0.07363e12, rel=1e-3)
    assert parts["teacher"] == pytest.approx(0.7321e12, rel=1e-3)
    assert total - parts["decoder"] == pytest.approx(1.8803e12, rel=1e-3)
    assert total == pytest.approx(47.1087e12, rel=1e-4)
