"""Captions of COCO's Karpathy split and OK-VQA as VILA evaluates them: 0 shots, or 4 with their pictures.

The Karpathy split names pictures and holds none: they lie in `coco/val2014` and `coco/train2014` below the data root,
as COCO's archives have them. Shots are the same four training examples for each question: those with the smallest
hashes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.data_root import DatasetNeed
from megatron_eve.evaluation.scorers.captions import CaptionRow, score_captions
from megatron_eve.evaluation.scorers.scores import Reported, answer_of, mean_in_percent
from megatron_eve.evaluation.tasks.documents import load_split, pictures, read_column, text_hash, undecoded
from megatron_eve.evaluation.tasks.prompts import short_answer

CAPTION = "Provide a one-sentence caption for the provided image."
KARPATHY, OKVQA = "yerevann/coco-karpathy", "lmms-lab-encoder/OK-VQA"
SHOTS = 4
Document = Mapping[str, Any]

# What lmms-eval's functions, which get one document and nothing else, need besides: the folder of COCO's pictures, and
# the shots by dataset.
_coco: list[Path] = []
_shots: dict[str, list[dict[str, Any]]] = {}


def karpathy(dataset: datasets.Dataset) -> datasets.Dataset:
    """Note where the pictures are. Called with the data root as working directory.

    Raises:
        DataError: there are none.
    """
    folder = Path.cwd() / "coco"
    if not (folder / "val2014").is_dir():
        raise DataError(
            f"vila_coco_karpathy: --data-root {folder.parent} has no folder coco/val2014: unpack COCO's "
            "val2014.zip (and train2014.zip, for the shots) there; a link will do"
        )
    _coco[:] = [folder]
    return dataset


def karpathy_4shot(dataset: datasets.Dataset) -> datasets.Dataset:
    """Choose the shots from the split train, too."""
    _shots[KARPATHY] = _chosen(load_split(KARPATHY, None, "train"), "filename")
    return karpathy(dataset)


def okvqa_4shot(dataset: datasets.Dataset) -> datasets.Dataset:
    """Choose the shots from the split train2014, which the hub's folder does not have."""
    _shots[OKVQA] = _chosen(undecoded(load_split(OKVQA, None, "train2014")), "question_id")
    return undecoded(dataset)


def _chosen(train: datasets.Dataset, name: str) -> list[dict[str, Any]]:
    return [train[row] for row in _shot_rows(train[name])]


def _shot_rows(names: Sequence[Any]) -> list[int]:
    return heapq.nsmallest(SHOTS, range(len(names)), key=[text_hash(str(one)) for one in names].__getitem__)


def karpathy_files(root: Path) -> dict[str, list[Path]]:
    """The pictures that the split test names, for the digest of the data."""
    return {"coco (split test)": [_path(root / "coco", name) for name in _names(root, "test")]}


def karpathy_4shot_files(root: Path) -> dict[str, list[Path]]:
    """The same, and the pictures of the shots."""
    names = _names(root, "train")
    return karpathy_files(root) | {
        "coco (shots)": [_path(root / "coco", names[row]) for row in _shot_rows(names)]
    }


def _names(root: Path, split: str) -> list[str]:
    return read_column(root, DatasetNeed("vila_coco_karpathy", KARPATHY, None, split, ("filename",)))


def _path(coco: Path, filename: str) -> Path:
    name = Path(filename).name  # COCO_val2014_000000391895.jpg
    return coco / ("train2014" if "train2014" in name else "val2014") / name


def coco_picture(doc: Document) -> list[Image.Image]:
    """The picture of a row of the Karpathy split."""
    return [Image.open(_path(_coco[0], doc["filename"])).convert("RGB")]


def caption_prompt(doc: Document) -> str:
    """The same for each picture."""
    return CAPTION


def karpathy_messages(doc: Document) -> list[dict[str, Any]]:
    """Four pictures with a caption each, then the picture in question."""
    shots = [(coco_picture(shot), CAPTION, shot["sentences"][0]) for shot in _shots[KARPATHY]]
    return _messages(shots, coco_picture(doc), CAPTION)


def okvqa_messages(doc: Document) -> list[dict[str, Any]]:
    """Four questions with the answer that most people gave, then the question."""
    shots = [
        (pictures(shot), short_answer(shot), Counter(shot["answers"]).most_common(1)[0][0])
        for shot in _shots[OKVQA]
    ]
    return _messages(shots, pictures(doc), short_answer(doc))


def _messages(
    shots: Sequence[tuple[list[Image.Image], str, str]], shown: list[Image.Image], question: str
) -> list[dict[str, Any]]:
    messages = []
    for images, asked, answer in shots:
        messages += [
            _asked(images, asked),
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return [*messages, _asked(shown, question)]


def _asked(images: list[Image.Image], text: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image", "url": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def caption_row(doc: Document, results: Sequence[str]) -> dict[str, CaptionRow]:
    """A picture of the Karpathy split."""
    row = CaptionRow(doc["filename"], tuple(doc["sentences"]), answer_of(results))
    return dict.fromkeys(("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "METEOR"), row)


def _captions(metric: str, rows: Sequence[CaptionRow]) -> Reported:
    score = score_captions("vila_coco_karpathy", rows, metric)
    if score.points:
        return mean_in_percent(score.points, score.left_out)
    return Reported(None if score.value is None else 100 * score.value, None, score.n, score.left_out)


cider = partial(_captions, "CIDEr")
bleu_1 = partial(_captions, "Bleu_1")
bleu_2 = partial(_captions, "Bleu_2")
bleu_3 = partial(_captions, "Bleu_3")
bleu_4 = partial(_captions, "Bleu_4")
rouge_l = partial(_captions, "ROUGE_L")
meteor = partial(_captions, "METEOR")
