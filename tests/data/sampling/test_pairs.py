"""Pairs of a picture and a text: what preprocessing makes of them, and which of them each rank has in a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.sampling.orders import ShuffledOrder, split_dataset
from megatron_eve.data.sampling.pairs import PairLoader, long_texts, slice_of
from megatron_eve.data.text.json_tokenizer import JsonTokenizer
from megatron_eve.models.vila_u.tower_family import clean_text
from tests.models.vila_u.pairs import SIDE, caption, write_pairs, write_tokenizer

LENGTH = 8
COUNT = 23


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    texts = [caption(number) for number in range(COUNT - 1)]
    long = "red green blue white black yellow pink brown car house"
    return write_pairs(folder, write_tokenizer(folder / "siglip"), [*texts, long])


@pytest.fixture(scope="module")
def dataset(prefix: str) -> IndexedVisionDataset:
    found = IndexedVisionDataset(prefix)
    found.use_image_settings("vila_u_tower", {"tower_size": SIDE})
    return found


def loader(dataset: IndexedVisionDataset, rank: int = 0, ranks: int = 1, batch: int = 7) -> PairLoader:
    part, _ = split_dataset("pairs", 0, len(dataset), 0.0)
    return PairLoader(
        dataset, ShuffledOrder([part], 5, True),
        global_batch_size=batch, rank=rank, ranks=ranks, view="tower", text_length=LENGTH, pad=1,
    )  # fmt: skip


def test_texts_are_read_as_siglip_reads_them(prefix: str, dataset: IndexedVisionDataset) -> None:
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

    settings = SimpleNamespace(
        do_lower_case=True, remove_punctuation=partial(SiglipTokenizer.remove_punctuation, None)
    )
    for text in ("A red car, Nr. 0!", "  Two   dogs' \n beds -- (old) ", "it's 9 o'clock"):
        assert clean_text(text) == SiglipTokenizer.canonicalize_text(settings, text)  # type: ignore[arg-type]
    tokenizer = JsonTokenizer(Path(prefix).parent / "siglip" / "tokenizer.json")
    tokens, _ = dataset.text(3)
    assert tokens.tolist() == [-200, *tokenizer.encode("a white car nr 0"), 1]


def test_ranks_have_all_pairs_of_a_step_in_its_order(dataset: IndexedVisionDataset) -> None:
    alone = loader(dataset)
    for ranks in (2, 3):
        several = [loader(dataset, rank, ranks) for rank in range(ranks)]
        for start in (0, 7, 14):
            whole, parts = alone.step(start), [one.step(start) for one in several]
            assert all(np.array_equal(part.sample_ids, whole.sample_ids) for part in parts)
            assert [place for part in parts for place in part.mine] == list(range(7))
            for name in ("pixels", "tokens"):
                together = torch.cat([getattr(part.batch(), name) for part in parts])
                assert torch.equal(together, getattr(whole.batch(), name))
            assert all(part.counts == whole.counts for part in parts)
        for one in several:
            one.close()
    alone.close()
    assert [len(slice_of(5, rank, 3)) for rank in range(3)] == [1, 2, 2]


def test_what_a_pair_becomes(dataset: IndexedVisionDataset) -> None:
    pairs = loader(dataset, batch=2)
    step = pairs.step_of(np.array([0, COUNT - 1]))
    batch = step.batch()
    assert batch.pixels.shape == (2, SIDE, SIDE, 3) and batch.pixels.dtype == torch.uint8
    short, long = batch.tokens.tolist()
    text = dataset.text(0)[0].tolist()[1:]
    assert short == text + [1] * (LENGTH - len(text))
    # Ten words and the end: seven of them, and the end.
    assert long == [*dataset.text(COUNT - 1)[0].tolist()[1:LENGTH], 1]
    assert step.counts == {"tokens": len(text) + LENGTH, "images": 2, "cut_texts": 1}
    assert long_texts(dataset, LENGTH) == 1
    pairs.close()


def test_a_step_is_the_same_whenever_it_is_asked_for(dataset: IndexedVisionDataset) -> None:
    one, other = loader(dataset), loader(dataset)
    first = [one.step(start) for start in (0, 7, 14)]
    tokens = [step.batch().tokens for step in first]  # asked for in turns, each prepares the next
    assert torch.equal(other.step(14).batch().tokens, tokens[2])
    assert torch.equal(other.step(7).batch().tokens, tokens[1])
    with pytest.raises(ValueError, match="no step takes 8 samples"):
        one.step(0, 8)
    one.close()
    other.close()


def test_a_damaged_picture_is_a_grey_one(prefix: str, tmp_path: Path) -> None:
    import shutil

    for path in Path(prefix).parent.glob("pairs_*"):
        shutil.copyfile(path, tmp_path / path.name)
    image = tmp_path / "pairs_image.bin"
    size = int(np.load(tmp_path / "pairs_images.npy")["num_bytes"][0])
    image.write_bytes(bytes(size) + image.read_bytes()[size:])
    damaged = IndexedVisionDataset(str(tmp_path / "pairs"))
    damaged.use_image_settings("vila_u_tower", {"tower_size": SIDE})
    pairs = loader(damaged, batch=2)
    batch = pairs.step_of(np.array([0, 1])).batch()
    assert (batch.pixels[0] == 127).all() and not (batch.pixels[1] == 127).all()
    assert list(pairs.damaged) == [0]
    pairs.close()
