"""Cases of captions, their scorer's and their tasks', and the changes of the rules that they have to notice.

They need java, pycocoevalcap and lmms-eval's datasets, and so are not among the cases of the other scorers.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from megatron_eve.evaluation.scorers.scores import NoAnswer
from tests.evaluation.case import Case, Mutation, Refused

SCORER, TASKS = "captions", "tasks.captions"
ROWS: list[tuple[str, tuple[str, ...], str | None]] = [
    ("a.jpg", ("A cat sits on a mat.", "a cat on the mat"), "A cat sits on a mat"),
    ("b.jpg", ("A red cup of coffee.", "coffee in a red cup"), "a dog"),
    ("c.jpg", ("Two dogs run.", "two dogs running"), "Two dogs run!"),
    ("d.jpg", ("A man rides a horse.", "man on a horse"), None),
]
METRICS = ("CIDEr", "ROUGE_L", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
# As pycocoevalcap's own classes give them, with its own tokenizer, for an empty caption in the last place.
VALUES = (2.8489, 0.5663, 0.4811, 0.4720, 0.4903, 0.4998)
CIDER = (6.141, 0.0463, 5.2083, 0.0)


def rows(m: ModuleType, *given: Any) -> list[Any]:
    return [m.CaptionRow(*row) for row in given or ROWS]


def score(m: ModuleType, metric: str, *given: Any) -> Any:
    return m.score_captions("karpathy", rows(m, *given), metric)


def scores(m: ModuleType) -> tuple[Any, ...]:
    found = {metric: score(m, metric) for metric in METRICS}
    values = tuple(round(one.value, 4) for one in found.values())
    points = tuple(round(point, 4) for point in found["CIDEr"].points)
    return (
        values,
        points,
        tuple(one.n for one in found.values()),
        found["Bleu_1"].points,
        notes(found["CIDEr"]),
    )


def notes(found: Any) -> tuple[Any, ...]:
    return tuple((note.what, note.count) for note in found.left_out)


@contextlib.contextmanager
def only_java(script: str | None) -> Iterator[None]:
    """Inside, no program is there but this java, if any."""
    before = os.environ["PATH"]
    with tempfile.TemporaryDirectory() as folder:
        if script is not None:
            java = Path(folder) / "java"
            java.write_text(f"#!/bin/sh\n{script}\n")
            java.chmod(0o755)
        os.environ["PATH"] = folder
        try:
            yield
        finally:
            os.environ["PATH"] = before


def with_java(m: ModuleType, script: str | None) -> Any:
    with only_java(script):
        return score(m, "CIDEr", ROWS[0], ROWS[3])


def without_java(m: ModuleType) -> tuple[Any, ...]:
    found = with_java(m, None)
    return (found.value, found.points, found.n, notes(found))


ODD = ("A man's dog - it isn't HIS.", "a  b\n c", "a\0b", "a\ud800b", "(two) cats...", "")
FAILS = 'while read -r line; do echo "$line"; done; echo no memory >&2; exit 1'
WORDS = ("a man 's dog it is n't his", "a b c", "a b", "a?b", "-lrb- two -rrb- cats", "")
CASES = [
    Case(SCORER, "scores", scores, (VALUES, CIDER, (4,) * 6, (), (("answers", 1),))),
    Case(SCORER, "words", lambda m: tuple(m._tokenized("karpathy", ODD)), WORDS),
    Case(SCORER, "no rows", lambda m: m.score_captions("karpathy", [], "CIDEr"), Refused("there are no questions")),
    *(
        Case(SCORER, f"references {given!r}", lambda m, given=given: score(m, "CIDEr", (7, given, "a")),
             Refused("^karpathy, question 7: the label is .*; give the captions that people wrote"))
        for given in ((), ("a cat", " "), ("a cat", None))
    ),
    Case(SCORER, "no java", without_java, (None, (), 2, (("answers", 1), ("scores", 1)))),
    Case(SCORER, "java fails", lambda m: with_java(m, FAILS), Refused("no memory")),
    Case(SCORER, "java loses a line", lambda m: with_java(m, "echo a"), Refused("split 1 of 6 captions")),
]  # fmt: skip
MUTATIONS = [
    Mutation(SCORER, "another caption where there is none", 'row.answer or ""', 'row.answer or "a"'),
    Mutation(SCORER, "a picture without an answer left out of the notes", "no_answers([row.answer for row in rows])",
             "()"),
    Mutation(SCORER, "punctuation counts", " if word not in left_out", ""),
    Mutation(SCORER, "capitals count", '"-lowerCase", ', ""),
    Mutation(SCORER, "a line each is not kept", '"-preserveLines", ', ""),
    Mutation(SCORER, "another encoding", '"utf-8"]', '"latin-1"]'),
    Mutation(SCORER, "one n-gram too few", "bleu[int(metric[-1]) - 1]", "bleu[int(metric[-1]) - 2]"),
    Mutation(SCORER, "shorter Bleu for all", "Bleu(4)", "Bleu(3)"),
    Mutation(SCORER, "ROUGE_L for CIDEr", 'Cider() if metric == "CIDEr"', 'Cider() if metric == "ROUGE_L"'),
    Mutation(SCORER, "the first caption of people alone", "[next(lines) for _ in row.references]",
             "[next(lines) for _ in row.references][:1]"),
    Mutation(SCORER, "captions of people scored", "Rouge()).compute_score(references, captions)",
             "Rouge()).compute_score({n: one[:1] for n, one in references.items()}, captions)"),
    Mutation(SCORER, "n of the points", "CaptionScore(value, points, len(rows), notes)",
             "CaptionScore(value, points, len(points), notes)"),
    Mutation(SCORER, "no rows are a score", "require_rows(task, rows)", "pass"),
    Mutation(SCORER, "no references are taken", "not row.references or ", ""),
    Mutation(SCORER, "empty references are taken", " and text.strip()", ""),
    Mutation(SCORER, "a zero without java", "CaptionScore(None, (), len(rows)", "CaptionScore(0.0, (), len(rows)"),
    Mutation(SCORER, "no note without java", "(*notes, missing)", "notes"),
    Mutation(SCORER, "a failing java is believed", "if run.returncode or ", "if "),
    Mutation(SCORER, "lost lines are believed", " or len(lines) != len(texts)", ""),
    Mutation(SCORER, "lines stay lines", 'return " ".join(text.replace("\\0", " ").encode("utf-8", "replace").decode()'
             '.split())', 'return text.replace("\\0", " ").encode("utf-8", "replace").decode()'),
]  # fmt: skip


# The tasks.
def picture(folder: Path, name: str, shade: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), shade).save(folder / name, "PNG")


@contextlib.contextmanager
def coco(m: ModuleType) -> Iterator[None]:
    """COCO's folders with a picture each, of the same number: 10 in val2014, 20 in train2014."""
    with tempfile.TemporaryDirectory() as written:
        for part, shade in (("val2014", 10), ("train2014", 20)):
            picture(Path(written) / part, f"COCO_{part}_1.jpg", shade)
        m._coco[:] = [Path(written)]
        yield


def shown(images: Sequence[Image.Image]) -> tuple[Any, ...]:
    return tuple((image.mode, image.getpixel((0, 0))) for image in images)


def coco_picture(m: ModuleType, name: str) -> tuple[Any, ...]:
    with coco(m):
        return shown(m.coco_picture({"filename": name}))


def told(messages: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """Role, and parts: red of a picture, or text."""
    return tuple(
        (one["role"], *(part["url"].getpixel((0, 0))[0] if part["type"] == "image" else part["text"]
                        for part in one["content"]))
        for one in messages
    )  # fmt: skip


def karpathy_messages(m: ModuleType) -> tuple[Any, ...]:
    with coco(m):
        m._shots[m.KARPATHY] = [{"filename": "COCO_train2014_1.jpg", "sentences": ["first", "second"]}]
        return told(m.karpathy_messages({"filename": "COCO_val2014_1.jpg"}))


def okvqa_messages(m: ModuleType) -> tuple[Any, ...]:
    doc = {"question": "What?", "image": Image.new("RGB", (4, 4), (30, 0, 0))}
    shot = {"question": "Which?", "image": Image.new("RGB", (4, 4), (40, 0, 0)), "answers": ["a", "b", "b"]}
    m._shots[m.OKVQA] = [shot]
    return told(m.okvqa_messages(doc))


def chosen(m: ModuleType) -> tuple[Any, ...]:
    import datasets

    names = [f"{number}.jpg" for number in range(8)]
    found = m._chosen(datasets.Dataset.from_dict({"filename": names, "row": list(range(8))}), "filename")
    return tuple(one["filename"] for one in found)


def no_folder(m: ModuleType) -> Any:
    with tempfile.TemporaryDirectory() as written, contextlib.chdir(written):
        Path("coco", "train2014").mkdir(parents=True)
        return m.karpathy(None)


def caption_row(m: ModuleType, answer: str) -> tuple[Any, ...]:
    found = m.caption_row({"filename": "a.jpg", "sentences": ["one", "two"]}, [answer])
    (row,) = set(found.values())
    return (*found, row.id, row.references, row.answer)


def reported(m: ModuleType, metric: str) -> tuple[Any, ...]:
    from megatron_eve.evaluation.scorers.captions import CaptionRow

    found = getattr(m, metric)([CaptionRow(*row) for row in ROWS])
    error = found.standard_error
    return (round(found.value, 2), error if error is None else round(error, 2), found.n, notes(found))


ALL = ("CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "METEOR")
CAPTION = "Provide a one-sentence caption for the provided image."
SHORT = "\nAnswer the question using a single word or phrase."
CASES += [
    Case(TASKS, "picture of val2014", lambda m: coco_picture(m, "COCO_val2014_1.jpg"), (("RGB", (10, 10, 10)),)),
    Case(TASKS, "picture of train2014", lambda m: coco_picture(m, "COCO_train2014_1.jpg"), (("RGB", (20, 20, 20)),)),
    Case(TASKS, "a name with a folder", lambda m: coco_picture(m, "x/COCO_val2014_1.jpg"), (("RGB", (10, 10, 10)),)),
    Case(TASKS, "prompt", lambda m: m.caption_prompt({}), CAPTION),
    Case(TASKS, "shots of the Karpathy split", karpathy_messages,
         (("user", 20, CAPTION), ("assistant", "first"), ("user", 10, CAPTION))),
    Case(TASKS, "shots of OK-VQA", okvqa_messages,
         (("user", 40, f"Which?{SHORT}"), ("assistant", "b"), ("user", 30, f"What?{SHORT}"))),
    Case(TASKS, "choice of shots", chosen, ("0.jpg", "5.jpg", "1.jpg", "6.jpg")),
    Case(TASKS, "no val2014", no_folder, Refused("has no folder coco/val2014")),
    Case(TASKS, "row", lambda m: caption_row(m, "said"), (*ALL, "a.jpg", ("one", "two"), "said")),
    Case(TASKS, "row without an answer", lambda m: caption_row(m, NoAnswer()), (*ALL, "a.jpg", ("one", "two"), None)),
    *(
        Case(TASKS, name, lambda m, name=name: reported(m, name), (value, error, 4, (("answers", 1),)))
        for name, value, error in (
            ("cider", 284.89, 164.26), ("rouge_l", 56.63, 25.62), ("bleu_1", 48.11, None), ("bleu_2", 47.20, None),
            ("bleu_3", 49.03, None), ("bleu_4", 49.98, None),
        )
    ),
]  # fmt: skip
MUTATIONS += [
    Mutation(TASKS, "all pictures from val2014", '"train2014" if "train2014" in name else "val2014"', '"val2014"'),
    Mutation(TASKS, "pictures in their own mode", 'Image.open(_path(_coco[0], doc["filename"])).convert("RGB")',
             'Image.open(_path(_coco[0], doc["filename"]))'),
    Mutation(TASKS, "names with their folders", "Path(filename).name", "filename"),
    Mutation(TASKS, "another prompt", "Provide a one-sentence caption for", "Provide a caption for"),
    Mutation(TASKS, "the last caption of a shot", 'shot["sentences"][0]', 'shot["sentences"][-1]'),
    Mutation(TASKS, "the first answer of a shot", 'Counter(shot["answers"]).most_common(1)[0][0]',
             'shot["answers"][0]'),
    Mutation(TASKS, "a shot's question without its prompt", "(pictures(shot), short_answer(shot), ",
             '(pictures(shot), shot["question"], '),
    Mutation(TASKS, "a shot's picture is the question's", "(pictures(shot), ", "(pictures(doc), "),
    Mutation(TASKS, "shots behind the question", "return [*messages, _asked(shown, question)]",
             "return [_asked(shown, question), *messages]"),
    Mutation(TASKS, "answers of shots are asked", '"role": "assistant"', '"role": "user"'),
    Mutation(TASKS, "pictures behind texts", '[*content, {"type": "text", "text": text}]',
             '[{"type": "text", "text": text}, *content]'),
    Mutation(TASKS, "three shots", "SHOTS = 4", "SHOTS = 3"),
    Mutation(TASKS, "the largest hashes", "heapq.nsmallest", "heapq.nlargest"),
    Mutation(TASKS, "the first names", "[text_hash(str(one)) for one in names]", "names"),
    Mutation(TASKS, "any folder of COCO's", '(folder / "val2014").is_dir()', "folder.is_dir()"),
    Mutation(TASKS, "an empty answer where there is none", "answer_of(results))", "str(results[0]))"),
    Mutation(TASKS, "one caption of people", 'tuple(doc["sentences"])', 'tuple(doc["sentences"][:1])'),
    Mutation(TASKS, "fractions", "100 * score.value", "score.value"),
    Mutation(TASKS, "no standard error", "if score.points:", "if not score.points and score.value is None:"),
    Mutation(TASKS, "notes lost", "score.n, score.left_out)", "score.n)"),
    Mutation(TASKS, "notes of means lost", "mean_in_percent(score.points, score.left_out)",
             "mean_in_percent(score.points)"),
    *(
        Mutation(TASKS, f"another score as {name}", f'partial(_captions, "{name}")', f'partial(_captions, "{other}")')
        for name, other in (("CIDEr", "ROUGE_L"), ("ROUGE_L", "CIDEr"), ("Bleu_1", "Bleu_2"), ("Bleu_4", "Bleu_3"))
    ),
]  # fmt: skip
