"""How answers become rows of scorers, and scores the values of a table.

lmms-eval calls a function of the first kind (`*_row`) with each document and its answer, and one of the second kind
with all rows of a metric. Documents come without their pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.data_root import DatasetNeed
from megatron_eve.evaluation.scorers.answer_processor import process_answer
from megatron_eve.evaluation.scorers.circular import CircularRow, is_right, score_circular
from megatron_eve.evaluation.scorers.exact import (
    MatchRow,
    ScienceQARow,
    score_gqa,
    score_science_qa,
    score_seed,
)
from megatron_eve.evaluation.scorers.judged import JudgeRow
from megatron_eve.evaluation.scorers.mme import COGNITION, MMERow, read_answer, score_mme
from megatron_eve.evaluation.scorers.pope import POPERow, YesNoCounts, says_yes, score_pope
from megatron_eve.evaluation.scorers.scores import (
    LeftOut,
    Reported,
    Submission,
    answer_of,
    counted,
    in_percent,
    mean_in_percent,
    no_answers,
    yes_or_no,
)
from megatron_eve.evaluation.scorers.vqa import VQARow, VQARule, score_vqa
from megatron_eve.evaluation.tasks.documents import read_column
from megatron_eve.evaluation.tasks.prompts import mmbench_options

VQAV2 = "lmms-lab-encoder/VQAv2"
Document = Mapping[str, Any]
Results = Sequence[str]


# VQA accuracy.
def vqav2_row(doc: Document, results: Results) -> dict[str, VQARow]:
    """VQAv2, whose people's answers stand in objects."""
    people = [one["answer"] for one in doc["answers"] or ()]
    return {"accuracy": VQARow(doc["question_id"], answer_of(results), people)}


def vqa_row(doc: Document, results: Results) -> dict[str, VQARow]:
    """TextVQA, VizWiz and OK-VQA."""
    return {"accuracy": VQARow(doc["question_id"], answer_of(results), doc["answers"] or ())}


def _vqa(task: str, rule: VQARule, rows: Sequence[VQARow]) -> Reported:
    return in_percent(score_vqa(task, rows, rule), rows)


vqav2_accuracy = partial(_vqa, "eve_vqav2_val", "converted")
vizwiz_accuracy = partial(_vqa, "eve_vizwiz_val", "processed")
textvqa_accuracy = partial(_vqa, "eve_textvqa", "processed")
textvqa_no_ocr_accuracy = partial(_vqa, "eve_textvqa_no_ocr", "processed")
quick_textvqa_accuracy = partial(_vqa, "quick_textvqa", "processed")
okvqa_accuracy = partial(_vqa, "vila_okvqa", "converted")
okvqa_4shot_accuracy = partial(_vqa, "vila_okvqa_4shot", "converted")


# Files for servers, and for a judge.
def vqav2_answer(doc: Document, results: Results) -> dict[str, tuple[dict[str, Any], str | None]]:
    """A row of VQAv2's file."""
    answer = answer_of(results)
    row = {"question_id": doc["question_id"], "answer": process_answer(answer or "")}
    return {"submission": (row, answer)}


def vizwiz_answer(doc: Document, results: Results) -> dict[str, tuple[dict[str, Any], str | None]]:
    """A row of VizWiz's file, which names the picture."""
    answer = answer_of(results)
    image = f"{str(doc['question_id']).removesuffix('.jpg')}.jpg"
    return {"submission": ({"image": image, "answer": process_answer(answer or "")}, answer)}


def mmvet_answer(doc: Document, results: Results) -> dict[str, tuple[str, JudgeRow]]:
    """The name of a question in MM-Vet's file, and the answer, as the model wrote it, for a judge."""
    name = f"v1_{str(doc['question_id']).removeprefix('v1_')}"
    groups = tuple(str(doc.get("capability") or "").split(","))
    return {
        "submission": (
            name,
            JudgeRow(name, doc["question"], doc.get("answer") or "", answer_of(results), groups),
        )
    }


def submission(rows: Sequence[tuple[dict[str, Any], str | None]]) -> Submission:
    """The file of VQAv2 and VizWiz: a list with an object for each question."""
    return Submission([row for row, _ in rows], no_answers([answer for _, answer in rows]))


def vqav2_testdev_submission(rows: Sequence[tuple[dict[str, Any], str | None]]) -> Submission:
    """VQAv2's file for test-dev. The server wants all questions of the split test: the others get an empty answer.

    Called with the data root as working directory.
    """
    found, asked = submission(rows), {row["question_id"] for row, _ in rows}
    need = DatasetNeed("eve_vqav2_testdev", VQAV2, None, "test", ("question_id",))
    try:
        others = [one for one in read_column(Path.cwd(), need) if one not in asked]
    except DataError:
        why = "VQAv2's test is not there: the file has the questions of test-dev alone, and the server may want all"
        return replace(found, left_out=(*found.left_out, LeftOut("split", 1, why)))
    why = "of the split test, not of test-dev: not asked, an empty text in the file"
    return Submission(
        [*found.rows, *({"question_id": one, "answer": ""} for one in others)],
        (*found.left_out, *counted("questions", len(others), why)),
        len(others),
    )


def mmvet_submission(rows: Sequence[tuple[str, JudgeRow]]) -> Submission:
    """The file of MM-Vet: one object, answer by question."""
    judged = tuple(row for _, row in rows)
    answers = {name: row.answer or "" for name, row in rows}
    return Submission(answers, no_answers([row.answer for row in judged]), judged=judged)


# POPE.
def pope_row(doc: Document, results: Results) -> dict[str, POPERow]:
    """POPE: values over all questions, and F1 of the question's category."""
    row = POPERow(doc["question_id"], doc["category"], doc["answer"], answer_of(results))
    names = ("f1", "accuracy", "precision", "recall", "yes_ratio", f"f1_{row.category}")
    return dict.fromkeys(names, row)


def pope_f1(rows: Sequence[POPERow]) -> Reported:
    """Mean F1 of the categories, which is what tables have as POPE."""
    score = score_pope("eve_pope", rows)
    points = tuple(
        float(row.answer is not None and says_yes(row.answer) == yes_or_no("eve_pope", row.id, row.label))
        for row in rows
    )
    return Reported(100 * score.value, None, score.n, score.left_out, tuple(rows), points)


def pope_f1_of_category(rows: Sequence[POPERow]) -> Reported:
    """F1 of one category, all of whose rows these are."""
    return replace(pope_f1(rows), left_out=())


def _pope(value: Callable[[YesNoCounts], float], rows: Sequence[POPERow]) -> Reported:
    """A value over all questions, whatever their category."""
    counts = score_pope("eve_pope", [replace(row, category="all") for row in rows]).categories["all"]
    return Reported(100 * value(counts), None, counts.n)


pope_precision = partial(_pope, lambda counts: counts.precision)
pope_recall = partial(_pope, lambda counts: counts.recall)


def pope_accuracy(rows: Sequence[POPERow]) -> Reported:
    """Share of right answers."""
    return mean_in_percent([score_pope("eve_pope", [row]).categories[row.category].accuracy for row in rows])


def pope_yes_ratio(rows: Sequence[POPERow]) -> Reported:
    """Share of the answers that say yes; of those that exist."""
    answers = [row.answer for row in rows if row.answer is not None]
    return mean_in_percent([float(says_yes(answer)) for answer in answers] or [0.0])


# MME.
def mme_row(doc: Document, results: Results) -> dict[str, MMERow]:
    """MME: a row counts in its category and in its sum; perception stands for the task, and gets all of them."""
    row = MMERow(doc["category"], str(doc["question_id"]), doc["answer"], answer_of(results))
    names = ["perception", row.category, *(["cognition"] if _cognition(row) else [])]
    return dict.fromkeys(names, row)


def _cognition(row: MMERow) -> bool:
    return row.category in COGNITION


def mme_perception(rows: Sequence[MMERow]) -> Reported:
    """The sum over the categories of perception, at most 2,000."""
    score = score_mme("eve_mme", rows)
    n = sum(not _cognition(row) for row in rows)
    points = tuple(
        float(
            row.answer is not None and read_answer(row.answer) is yes_or_no("eve_mme", row.picture, row.label)
        )
        for row in rows
    )
    return Reported(score.perception, None, n, score.left_out, tuple(rows), points)


def mme_cognition(rows: Sequence[MMERow]) -> Reported:
    """The sum over the categories of cognition, at most 800."""
    score = score_mme("eve_mme", rows)
    return Reported(score.cognition, None, score.n)


def mme_category(rows: Sequence[MMERow]) -> Reported:
    """The points of one category, all of whose rows these are; at most 200."""
    (category,) = score_mme("eve_mme", rows).categories.values()
    return Reported(category.value, None, category.n)


# Multiple choice and exact match.
def science_qa_row(doc: Document, results: Results) -> dict[str, ScienceQARow]:
    """ScienceQA, which has no ids: the question names the row. Which questions are asked is the task's affair."""
    row = ScienceQARow(doc["question"], doc["answer"], len(doc["choices"]), False, answer_of(results))
    return {"accuracy": row}


def _science_qa(task: str, rows: Sequence[ScienceQARow]) -> Reported:
    return in_percent(score_science_qa(task, rows, "all"), rows)


sqa_accuracy = partial(_science_qa, "eve_sqa")
sqa_img_accuracy = partial(_science_qa, "eve_sqa_img")
sqa_text_accuracy = partial(_science_qa, "eve_sqa_text")
quick_sqa_accuracy = partial(_science_qa, "quick_sqa")


def gqa_row(doc: Document, results: Results) -> dict[str, MatchRow]:
    """GQA."""
    return {"accuracy": MatchRow(doc["id"], doc["answer"], answer_of(results))}


def gqa_accuracy(rows: Sequence[MatchRow]) -> Reported:
    """Share of right answers."""
    return in_percent(score_gqa("eve_gqa", rows), rows)


def seed_row(doc: Document, results: Results) -> dict[str, MatchRow]:
    """SEED-Bench."""
    return {"accuracy": MatchRow(doc["question_id"], doc["answer"], answer_of(results))}


def seed_accuracy(rows: Sequence[MatchRow]) -> Reported:
    """Share of answers that are the letter and nothing else."""
    return in_percent(score_seed("eve_seed_image", rows), rows)


# MMBench.
def mmbench_row(doc: Document, results: Results) -> dict[str, CircularRow]:
    """One rotation of a question of MMBench."""
    row = CircularRow(
        int(doc["index"]), doc["category"], mmbench_options(doc), doc["answer"], answer_of(results)
    )
    return {"accuracy": row, f"accuracy_{row.category}": row}


def _circular(task: str, rows: Sequence[CircularRow]) -> Reported:
    reported = in_percent(score_circular(task, rows).score)
    return replace(reported, rows=tuple(rows), points=tuple(float(is_right(row)) for row in rows))


def mmbench_category(rows: Sequence[CircularRow]) -> Reported:
    """Accuracy by question in one category, all of whose rows these are."""
    return replace(_circular("eve_mmbench", rows), left_out=())


mmbench_en_accuracy = partial(_circular, "eve_mmbench_en")
mmbench_cn_accuracy = partial(_circular, "eve_mmbench_cn")
