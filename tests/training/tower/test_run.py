"""A run of a tower over the training loop: saved and resumed, under other numbers of ranks, and read by tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_eve.config import RunConfig, parse
from megatron_eve.config.flags import TRAIN_TOWER
from megatron_eve.config.memory import rank_memory
from tests.models.vila_u.pairs import SIDE, caption, write_pairs, write_siglip
from tests.ranks import RankPool

ITERATIONS = 4


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tower")
    siglip = write_siglip(folder / "siglip")
    pairs = write_pairs(folder, siglip / "tokenizer.json", [caption(number) for number in range(24)])
    return [
        "--preset", "vila_u_tower_tiny", "--data-path", pairs, "--vision-tower", str(siglip), "--split", "75,25",
        "--perceptual-weights", "random", "--global-batch-size", "5", "--train-iters", str(ITERATIONS),
        # Of few vectors two are rarely as near, so that rounding changes no code: with 32 it does on some processors.
        "--visual-codebook-size", "8", "--lr", "1e-3", "--gan-start", "1", "--eval-interval", "2",
        # Else Adam moves what has hardly a gradient by the sign of its rounding, and a code may change.
        "--adam-eps", "1e-3",
    ]  # fmt: skip


def config_of(flags: list[str], save: Path, *others: str) -> RunConfig:
    return parse([*flags, "--save", str(save), "--save-interval", "2", *others], TRAIN_TOWER)


def some_steps(config: RunConfig) -> list[dict[str, float]]:
    """Runs on each rank: what every step reports, from where the run stands to its end or --exit-interval; it saves at
    --save-interval."""
    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import train_one
    from megatron_eve.training.tower.run import setup

    found = []
    with model_parallel(config):
        run, saver = setup(config), CheckpointSaver(config)
        while (iteration := run.train_state.iteration) < config.total_iterations:
            if found and iteration == config.training.exit_interval:
                break
            result = train_one(run)
            found.append({**result.values, **result.figures})
            if run.train_state.iteration % (config.checkpoint.save_interval or 1) == 0:
                run.save(saver)
        saver.finish()
        held_out = run.evaluate()
        found.append(
            {f"{name} {loss}": value for name, values in held_out.items() for loss, value in values.items()}
        )
        run.loader.close()
    return found


@pytest.fixture(scope="module")
def whole(ranks: RankPool, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """On two ranks, with slices of 2 and 3 pairs: the run's folder, and what it reports."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    found = ranks.run(2, some_steps, config_of(flags, folder))
    assert found[0] == found[1]
    return folder, found[0]


def test_it_learns_with_both_networks(whole: Any) -> None:
    _, found = whole
    assert [sorted(one) for one in found[1:ITERATIONS]] == [sorted(found[1])] * (ITERATIONS - 1)
    assert "discriminator loss" in found[1] and "discriminator loss" not in found[0]
    assert found[ITERATIONS - 1]["reconstruction loss"] < found[0]["reconstruction loss"]
    assert {"pairs PSNR", "pairs top-1 texts of pictures"} <= set(found[ITERATIONS])


def test_a_run_that_is_resumed_goes_on_to_the_bit(
    ranks: RankPool, flags: list[str], whole: Any, tmp_path: Path
) -> None:
    first = config_of(flags, tmp_path / "run", "--exit-interval", "2")
    assert ranks.run(2, some_steps, first)[0][:2] == whole[1][:2]
    again = config_of(flags, tmp_path / "run", "--load", str(tmp_path / "run"))
    assert ranks.run(2, some_steps, again)[0] == whole[1][2:]


def test_another_number_of_ranks_goes_on_to_rounding(
    ranks: RankPool, flags: list[str], whole: Any, tmp_path: Path
) -> None:
    loaded = config_of(flags, tmp_path / "run", "--load", str(whole[0] / "iter_0000002"))
    for alone, two in zip(ranks.run(1, some_steps, loaded)[0], whole[1][2:], strict=True):
        assert alone == pytest.approx(two, rel=2e-3, abs=2e-3)
        assert [alone[name] for name in alone if "codes" in name] == [
            two[name] for name in two if "codes" in name
        ]


def tower_of(folder: Path) -> Any:
    """As tools read it."""
    import torch

    from megatron_eve.models.registry import find_image_codes

    codes = find_image_codes("vila_u")
    return codes.load_tower(codes.read_tower(folder, {}), torch.device("cpu"), torch.float32)


def test_the_sheet_of_an_evaluation_shows_held_out_pictures(whole: Any) -> None:
    """Beside each of the six pictures stands what the saved tower makes of it at each depth."""
    import torch

    from megatron_eve.data.inspecting.reconstruction import reconstruct

    sheets = list((whole[0] / "reconstructions").iterdir())
    assert [sheet.name for sheet in sheets] == ["iter_0000004.png"]
    sheet, tower = np.asarray(Image.open(sheets[0])), tower_of(whole[0])
    columns, rows = (sheet.shape[1] - 8) // (8 + 2 * SIDE), (sheet.shape[0] - 30) // (44 + 2 * SIDE)
    assert (columns, rows) == (5, 6)
    for row in range(rows):
        top = 44 + row * (44 + 2 * SIDE)
        cells = [
            sheet[top:, 8 + column * (8 + 2 * SIDE) :][: 2 * SIDE : 2, : 2 * SIDE : 2] for column in range(5)
        ]
        found = reconstruct(tower, "", np.ascontiguousarray(cells[0]), torch.device("cpu"))
        assert cells[0].std() > 5 and all(map(np.array_equal, cells[1:], found.pictures))


def test_tools_read_its_checkpoint(
    flags: list[str], whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """reconstruct.py, tokenize_images.py, and an export with what it imports again."""
    from megatron_eve.models.vila_u.image_codes import IMAGE_CODES
    from megatron_eve.models.vila_u.tower_folder import read_tower_folder
    from tests.convert.test_conversion import convert
    from tools import reconstruct, tokenize_images

    pairs, siglip = (flags[flags.index(flag) + 1] for flag in ("--data-path", "--vision-tower"))
    words = ["--family", "vila_u", "--tower", str(whole[0])]
    photo, sheet = Path(pairs).parent / "pictures" / "0.png", tmp_path / "sheet.png"
    assert reconstruct.main([*words, "--input", str(photo), "--output", str(sheet)]) == 0
    assert sheet.is_file() and "depth 4" in capsys.readouterr().out
    out = str(tmp_path / "codes")
    assert tokenize_images.main([*words, "--input", pairs, "--output-prefix", out, "--workers", "1"]) == 0
    assert "24 images of 4 x 4 x 4 codes below 8" in capsys.readouterr().out
    published, again = tmp_path / "published", tmp_path / "again"
    assert convert("export", "--source", whole[0], "--target", published) == 0
    assert convert("import", "--source", published, "--target", again, "--siglip-config", siglip) == 0
    towers = [
        read_tower_folder(whole[0]),
        read_tower_folder(published, Path(siglip)),
        read_tower_folder(again),
    ]
    assert len({IMAGE_CODES.sha256(tower) for tower in towers}) == 1


def held(config: RunConfig) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Runs on each rank, for one step: what the start of a run prints of its memory; and what there is, bytes of the
    optimizer's tensors and the number of parameters that train."""
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import train_one
    from megatron_eve.training.monitoring.memory import training_bytes
    from megatron_eve.training.tower.run import setup

    with model_parallel(config):
        run = setup(config)
        printed = training_bytes(run.chunks, run.optimizer, config.training.bf16)
        others = run.networks.other_bytes()
        assert train_one(run).bad is None
        run.loader.close()
        state = 0
        for one in run.optimizer.chained_optimizers:
            moments = [
                part[name] for part in one.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
            ]
            masters = [master for group in one.shard_fp32_from_float16_groups for master in group]
            state += sum(tensor.nbytes for tensor in [*moments, *masters])
        trained = sum(p.numel() for chunk in run.chunks for p in chunk.parameters() if p.requires_grad)
        return printed, others, {"optimizer": state, "trained": trained}


@pytest.mark.parametrize("others", ["--bf16", "--reconstruction-weight 0", "--contrastive-weight 0"])
def test_bytes_of_a_rank_are_those_that_the_start_prints(
    ranks: RankPool, flags: list[str], tmp_path: Path, others: str
) -> None:
    """By the optimizer's tensors behind a step of both networks, whose moments two ranks share."""
    config = config_of(
        flags, tmp_path / "run", "--gan-start", "0", "--use-distributed-optimizer", *others.split()
    )
    found, expected = ranks.run(2, held, config), rank_memory(config, 2)
    for printed, _, real in found:
        assert printed.optimizer == real["optimizer"]
        assert printed.weights + found[0][1]["codebooks"] == pytest.approx(expected.weights, abs=10_000)
        assert 4 * real["trained"] == expected.gradients
        # megatron-core rounds each parameter's place in the buffer up to 64 elements.
        assert expected.gradients <= printed.gradients <= 1.05 * expected.gradients
    assert sum(real["optimizer"] for _, _, real in found) // 2 == expected.optimizer


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (("--visual-codebook-size", "64"), "was made with --visual-codebook-size 8, this run has 64"),
        (("--codes-per-position", "2"), "was made with --codes-per-position 4, this run has 2"),
        (("--gan-start", "0"), "was made with --gan-start 1, this run has 0"),
        (("--seed", "7"), "was made with --seed 1234, this run has 7"),
    ],
)
def test_what_does_not_fit_a_checkpoint(
    flags: list[str], whole: Any, tmp_path: Path, others: tuple[str, ...], sentence: str
) -> None:
    from megatron_eve.checkpoint.compatibility import CheckpointError, check_resume
    from megatron_eve.checkpoint.saved_state import read_common

    folder = whole[0] / "iter_0000002"
    saved = read_common(folder)
    assert saved is not None
    config = config_of(flags, tmp_path / "run", *others)
    with pytest.raises(CheckpointError, match=sentence):
        check_resume(folder, saved, config, saved["dataset"], saved["frozen"])
    check_resume(folder, saved, config_of(flags, tmp_path / "run"), saved["dataset"], saved["frozen"])


def test_weights_of_another_tower_are_refused_before_torch(
    flags: list[str], whole: Any, tmp_path: Path
) -> None:
    from megatron_eve.models.registry import tower_family

    family, folder = tower_family("vila_u_tower"), whole[0]
    assert family is not None
    config = replace(config_of(flags, tmp_path / "run"))
    assert not [*family.check_pretrained(config, folder)]
    other = config_of(flags, tmp_path / "run", "--visual-codebook-size", "64")
    (sentence,) = family.check_pretrained(other, folder)
    assert "its sizes of codebooks (--visual-codebook-size): [8], and of this run: [64]" in sentence
    (sentence,) = family.check_pretrained(config_of(flags, tmp_path, "--codes-per-position", "2"), folder)
    assert "its depth of codes (--codes-per-position): 4, and of this run: 2; use its sizes" in sentence
