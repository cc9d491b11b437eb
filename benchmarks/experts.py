"""Decoder layers with experts by rows, compared with a dense decoder and with the published blending.

    python benchmarks/experts.py --steps 5 \\
        --out tables
    python benchmarks/experts.py --toy

Forward and backward of three decoders in turns, in one process with random weights, on a pack of which 80 % are rows of
images: one set of weights (dense); two sets, each on its own rows (ours); and two sets, each on all rows, blended by a
mask (published). Linear layers: queries, keys and values, output projection and both layers of the MLP, each alone on
inputs of its own, with the reordering of rows that ours do. Decoder: the same layers with norms, attention and
activations. On a CPU layers of width 1024 in float32, compared by CPU time of all threads, which others on the machine
hardly change; on a GPU layers of EVE v2 7B in bfloat16, compared by time on the clock. With TransformerEngine the norms
of the dense decoder are part of its linear layers.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from gpu_common import parser, synchronize
from megatron.core.transformer.mlp import MLP
from tables import Table

from megatron_eve.config import PRESETS, ModelConfig, RunConfig
from megatron_eve.config.schema import TrainingConfig
from megatron_eve.models.build import build_chunks
from megatron_eve.models.decoder.expert_rows import ExpertRows, expert_rows
from megatron_eve.models.decoder.experts import (
    ExpertColumnLinear,
    ExpertGatedLinear,
    ExpertLinear,
    ExpertNorm,
    ExpertProjection,
    ExpertQKV,
    ExpertRowLinear,
)
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.decoder.packed import packed_params
from megatron_eve.models.process_groups import distributed
from megatron_eve.runtime.accelerator import accelerator

VISUAL_ROWS = 0.8
DENSE, OURS, PUBLISHED = "dense", "experts by rows", "published blending"
LINEAR, WHOLE = "linear layers", "decoder"


@dataclass
class BlendedRows(ExpertRows):
    """Rows in the order of the pack, for blending.

    Attributes:
        visual: [n, 1, 1] of the inputs' dtype, 1 in rows of images and 0 in others.
    """

    visual: torch.Tensor

    def blend(self, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        """What the text set and the visual set made of all rows, [n, 1, ...] each, blended."""
        return text * (1 - self.visual) + visual * self.visual


class BlendedNorm(ExpertNorm):
    """Both weights on all rows."""

    rows: BlendedRows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 1, D] in the order of the pack."""
        normed = self.normalise(x)
        return self.rows.blend(self.weight * normed, self.visual_weight * normed)


class OneSet(ExpertLinear):
    """All rows by the set that `visual` says; the MLP, which is blended as a whole, tells it."""

    visual = False

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """One set of weights on all rows: [n, 1, inputs] -> [n, 1, outputs]."""
        return self.by_set(x, self.visual)

    def by_both(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each set makes of all rows."""
        return [self.by_set(x, visual) for visual in (False, True)]


class Blended(OneSet):
    """Both sets of weights on all rows."""

    rows: BlendedRows

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """Both sets of weights on all rows, blended: [n, 1, inputs] -> [n, 1, outputs]."""
        return self.rows.blend(*self.by_both(x))


class OneSetColumn(OneSet, ExpertColumnLinear):
    """Gate and up projection."""


class OneSetRow(OneSet, ExpertRowLinear):
    """The second layer of the MLP."""


class BlendedColumn(Blended, ExpertColumnLinear):
    """Queries, keys and values."""


class BlendedRow(Blended, ExpertRowLinear):
    """The output projection of the attention."""


class BlendedMLP(MLP):
    """Both MLPs on all rows."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[n, 1, D] in the order of the pack, and no bias."""
        made = []
        for visual in (False, True):
            self.linear_fc1.visual = self.linear_fc2.visual = visual
            made.append(super().forward(hidden_states)[0])
        return self.linear_fc2.rows.blend(*made), None


BLENDED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    ExpertNorm: BlendedNorm,
    ExpertQKV: BlendedColumn,
    ExpertProjection: BlendedRow,
    ExpertGatedLinear: OneSetColumn,
    ExpertRowLinear: OneSetRow,
    MLP: BlendedMLP,
}
"""Our modules, and what does the same in the published way with the same weights."""


class Decoder:
    """One of the three, with a pack for it.

    Args:
        model: whose decoder it is.
        lengths: rows of each sample; in each the first 80 % are of an image.
        blended: compute both sets of weights on all rows.
    """

    def __init__(self, model: VisionLanguageModel, lengths: Sequence[int], blended: bool = False) -> None:
        self.model, device, count = model, accelerator().device, sum(lengths)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        self.packed = packed_params(bounds.to(device), list(lengths))
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        table = model.rotary_pos_emb(self.packed.max_seqlen_kv, packed_seq=True)
        self.rotary = table if model.config.apply_rope_fusion else table[positions]
        visual = torch.cat([torch.arange(length) < int(VISUAL_ROWS * length) for length in lengths])
        rows = expert_rows(visual)
        self.order = self.place = torch.arange(count, device=device)
        if blended:
            for module in model.decoder.modules():
                if type(module) in BLENDED:
                    module.__class__ = BLENDED[type(module)]
            mask = visual.to(device, model.config.params_dtype)[:, None, None]
            self.packed.expert_rows = BlendedRows(self.order, self.place, count, count, mask)
        elif model.has_experts:
            self.order, self.place = rows.order.to(device), rows.place.to(device)
            self.packed.expert_rows = replace(rows, order=self.order, place=self.place)
        self.linears = [
            module
            for layer in model.decoder.layers
            for module in (
                layer.self_attention.linear_qkv, layer.self_attention.linear_proj,
                layer.mlp.linear_fc1, layer.mlp.linear_fc2,
            )
        ]  # fmt: skip
        self.inputs = [
            torch.randn(count, 1, width, device=device, dtype=model.config.params_dtype, requires_grad=True)
            for width in (module.weight.shape[1] for module in self.linears)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers: [n, 1, D] in the order of the pack, in and out."""
        y = self.model.decoder(
            hidden_states=x[self.order],
            attention_mask=None,
            rotary_pos_emb=self.rotary,
            packed_seq_params=self.packed,
        )
        return y[self.place]

    def whole(self, x: torch.Tensor) -> None:
        """Forward and backward of all layers."""
        self.model.zero_grad()
        y = self.forward(x)
        y.backward(torch.ones_like(y))

    def linear(self, _: torch.Tensor) -> None:
        """Forward and backward of each linear layer alone."""
        self.model.zero_grad()
        for module, x in zip(self.linears, self.inputs, strict=True):
            x.grad = None
            made = module.by_both(x) if type(module) in (OneSetColumn, OneSetRow) else [module(x)[0]]
            torch.autograd.backward(made, [torch.ones_like(one) for one in made])


def model_config(toy: bool, layers: int) -> ModelConfig:
    """Sizes of the decoder: EVE v2's on a GPU, in the same proportions narrower on a CPU."""
    model = replace(PRESETS["eve2_7b"].model, num_layers=layers, vocab_size=512)
    if toy:
        return replace(model, hidden_size=64, ffn_hidden_size=336, num_attention_heads=4, num_query_groups=2)
    if accelerator().name == "cuda":
        return model
    return replace(model, hidden_size=1024, ffn_hidden_size=5376, num_attention_heads=8, num_query_groups=2)


def build(config: RunConfig) -> dict[str, VisionLanguageModel]:
    """The three models; those with experts have the same weights, of which the dense one has those for text."""
    dense = replace(config, model=replace(config.model, modality_experts=False))
    models = {
        name: build_chunks(one)[0] for name, one in ((DENSE, dense), (OURS, config), (PUBLISHED, config))
    }
    with torch.no_grad():
        for name, weight in models[OURS].named_parameters():
            # Norms and biases begin as ones and zeros, in which a mixed-up set would not show.
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02)
            if "layernorm" in name:
                weight.add_(1)
    models[PUBLISHED].load_state_dict(models[OURS].state_dict())
    return models


def compare(decoders: dict[str, Decoder], width: int, steps: int, table: Table) -> None:
    """Time all of them in turns and fill the table."""
    count, first = sum(decoders[DENSE].packed.lengths), decoders[DENSE].model.config
    x = torch.randn(count, 1, width, device=accelerator().device, dtype=first.params_dtype)
    with torch.no_grad():
        ours, published = (decoders[name].forward(x).float() for name in (OURS, PUBLISHED))
    apart = float((ours - published).norm() / published.norm())
    runs: dict[tuple[str, str], Callable[[torch.Tensor], None]] = {}
    for name, decoder in decoders.items():
        runs[LINEAR, name], runs[WHOLE, name] = decoder.linear, decoder.whole
    wall, cpu = defaultdict[Any, list[float]](list), defaultdict[Any, list[float]](list)
    for number in range(steps + 1):
        for key, run in runs.items():
            synchronize()
            clock, process = time.perf_counter(), time.process_time()
            run(x)
            synchronize()
            if number:  # the first one allocates
                wall[key].append(time.perf_counter() - clock)
                cpu[key].append(time.process_time() - process)
    compared = wall if accelerator().name == "cuda" else cpu
    for part, name in product((LINEAR, WHOLE), decoders):
        table.add(
            part,
            name,
            f"{1000 * statistics.median(wall[part, name]):.0f}",
            f"{1000 * statistics.median(cpu[part, name]):.0f}",
            f"{statistics.median(compared[part, name]) / statistics.median(compared[part, DENSE]):.2f}",
        )
    table.note(f"relative L2 distance of the outputs of ours and the published blending: {apart:.1e}")


def main() -> None:
    """Time all three and print the table."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=1, help="decoder layers")
    arguments = options.parse_args()
    on_gpu = accelerator().name == "cuda"
    lengths = [50] * 4 if arguments.toy else [500] * (16 if on_gpu else 4)
    config = RunConfig(
        family="eve2",
        model=model_config(arguments.toy, arguments.layers),
        vision=PRESETS["eve2_tiny"].vision,
        training=TrainingConfig(global_batch_size=1, train_iters=1, stage=3, bf16=on_gpu),
    )
    table = Table("experts by rows", ("part", "decoder", "ms", "CPU ms", "over dense"), arguments.out)
    with distributed(config):
        models = build(config)
        decoders = {
            name: Decoder(model, lengths, blended=name == PUBLISHED) for name, model in models.items()
        }
        compare(decoders, config.model.hidden_size, arguments.steps, table)
    table.note(
        f"layers: {config.model.num_layers}, width: {config.model.hidden_size}; {sum(lengths):,} rows, "
        f"{VISUAL_ROWS:.0%} of images, {'bfloat16' if on_gpu else 'float32'}, median of {arguments.steps}, "
        f"{torch.get_num_threads()} threads; compared by {'ms' if on_gpu else 'CPU ms'}"
    )
    table.close()


if __name__ == "__main__":
    main()
