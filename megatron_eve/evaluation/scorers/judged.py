"""Answers graded by another model, a judge: what it is asked of each, how its replies are read, and the values of all.

The published evaluators ask GPT-4 or GPT-3.5. The values of another judge are not those, and have names of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

from megatron_eve.evaluation.scorers import judge_prompts
from megatron_eve.evaluation.scorers.scores import (
    LeftOut,
    Reported,
    bad_label,
    counted,
    mean_in_percent,
    no_answers,
)

MMVET_CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
"""Of MM-Vet's questions, in the order of its tables; a question needs one or several."""
UNREAD = "not in the values of the judge"
_NUMBER = re.compile(r"(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)\s*[.|]?")
_BRACES = re.compile(r"\{([^{}]*)\}")
_PRED = re.compile(r"""['"]pred['"]\s*:\s*['"](yes|no)['"]""", re.I)
_GRADE = re.compile(r"""['"]score['"]\s*:\s*['"]?([0-5](?:\.\d+)?)['"]?\s*(?:,|$)""")
_FIRST_WORD = re.compile(r"\W*(yes|no)\b", re.I)


@dataclass(frozen=True)
class JudgeRow:
    """An answer to be graded.

    Attributes:
        id: of the question.
        question: as its dataset has it; for a picture that was drawn, its prompt.
        label: the right answer; not used for pictures.
        answer: the model's; None if it gave none, which is wrong, and of which no judge is asked.
        groups: whose values it counts in besides the value of all.
        picture: file of the answer, if it is a picture.
    """

    id: str | int
    question: str
    label: str
    answer: str | None
    groups: tuple[str, ...] = ()
    picture: Path | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        points: 0 (wrong) to 1.
        grade: 0 to 5, where the rule asks for one.
        probability: that the judge says yes, where the rule asks for it and the server gives it.
    """

    points: float
    grade: int | None = None
    probability: float | None = None


@dataclass(frozen=True)
class JudgeRule:
    """How a judge is asked, and its replies are read.

    Attributes:
        name: by which row functions name it.
        protocol: whose prompt it is.
        messages: of a chat, as (role, text).
        read: the verdict in a reply, whose second part is the probability of yes; None if there is none in it.
        values: the values of a table from verdicts.
        max_tokens: limit of a reply.
        groups: all groups, in the order of a table.
        asks_probability: the server is asked for the probability of yes.
        needs_label: rows must have one.
    """

    name: str
    protocol: str
    messages: Callable[[JudgeRow], list[tuple[str, str]]]
    read: Callable[[str, float | None], Verdict | None]
    values: Callable[[Sequence[Verdict]], dict[str, Reported]]
    max_tokens: int
    groups: tuple[str, ...] = ()
    asks_probability: bool = False
    needs_label: bool = True


def check_labels(task: str, rule: JudgeRule, rows: Sequence[JudgeRow]) -> None:
    """Refuse rows that a judge could not grade.

    Raises:
        DataError: a label or a question that is no text; names task, question and value.
    """
    for row in rows:
        for value in (row.question, row.label) if rule.needs_label else (row.question,):
            if not isinstance(value, str) or not value.strip():
                raise bad_label(task, row.id, value, "a judge needs question and answer as text")


def judged_values(
    rule: JudgeRule, rows: Sequence[JudgeRow], verdicts: Sequence[Verdict | None]
) -> dict[str, Reported]:
    """Values by name, "" for one without a name; the first has the notes.

    Args:
        rule: how they were graded.
        rows: all rows of a task.
        verdicts: of each; None where no reply could be read. Rows without an answer count 0, whatever stands here.
    """
    wrong = Verdict(0.0, 0, 0.0)
    found = [wrong if row.answer is None else one for row, one in zip(rows, verdicts, strict=True)]
    read = [one for one in found if one is not None]
    # Of one kind: where some replies have no probability, none is used.
    if any(
        one is not None and one.probability is None
        for row, one in zip(rows, found, strict=True)
        if row.answer is not None
    ):
        found = [one and replace(one, probability=None) for one in found]
        read = [one for one in found if one is not None]
    notes = (
        *no_answers([row.answer for row in rows]),
        *counted("answers", found.count(None), f"no reply of the judge could be read: {UNREAD}"),
    )
    values = _with_notes(rule.values(read), notes)
    for group in rule.groups:
        inside = [
            one
            for row, one in zip(rows, found, strict=True)
            if group in row.groups and one is not None
        ]  # fmt: skip
        if inside:
            values |= {
                f"{name}: {group}" if name else group: one for name, one in rule.values(inside).items()
            }
    return values


def _with_notes(values: Mapping[str, Reported], notes: tuple[LeftOut, ...]) -> dict[str, Reported]:
    first = next(iter(values))
    return {name: replace(one, left_out=notes if name == first else ()) for name, one in values.items()}


def _share(name: str, verdicts: Sequence[Verdict]) -> dict[str, Reported]:
    return {name: _mean([one.points for one in verdicts])}


def _mean(points: Sequence[float]) -> Reported:
    return mean_in_percent(points) if points else Reported(None, None, 0)


# MM-Vet.
def _mmvet_messages(row: JudgeRow) -> list[tuple[str, str]]:
    label = row.label.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return [("user", f"{judge_prompts.MMVET}\n{row.question} | {label} | {row.answer} |")]


def read_mmvet(reply: str, probability: float | None = None) -> Verdict | None:
    """A number from 0 to 1 and nothing else, but for the bar or full stop behind it.

    The published evaluator takes the first word of any reply that begins with a number.
    """
    found = _NUMBER.fullmatch(reply.strip())
    return Verdict(float(found[1])) if found else None


def _mmvet_values(verdicts: Sequence[Verdict]) -> dict[str, Reported]:
    return _share("", verdicts)


# Video-ChatGPT.
def _video_messages(row: JudgeRow) -> list[tuple[str, str]]:
    asked = _filled(judge_prompts.VIDEO_CHATGPT, {"@q": row.question, "@l": row.label, "@a": str(row.answer)})
    return [("system", judge_prompts.VIDEO_CHATGPT_SYSTEM), ("user", asked)]


def read_video(reply: str, probability: float | None = None) -> Verdict | None:
    """One `{'pred': 'yes', 'score': 4}` anywhere in the reply; of 4.8 the published evaluator takes 4."""
    found = _BRACES.findall(reply)
    if len(found) != 1:
        return None
    said, grade = _PRED.findall(found[0]), _GRADE.findall(found[0].strip())
    if len(said) != 1 or len(grade) != 1 or float(grade[0]) > 5:
        return None
    return Verdict(float(said[0].lower() == "yes"), int(float(grade[0])))


def _video_values(verdicts: Sequence[Verdict]) -> dict[str, Reported]:
    grades = [float(one.grade or 0) for one in verdicts]
    n = len(grades)
    error = stdev(grades) / sqrt(n) if n > 1 else None
    return _share("accuracy", verdicts) | {"score of 5": Reported(fmean(grades) if n else None, error, n)}


# VQAScore, of pictures that were drawn.
def _picture_messages(row: JudgeRow) -> list[tuple[str, str]]:
    return [("user", _filled(judge_prompts.VQA_SCORE, {"@q": row.question}))]


def read_yes_no(reply: str, probability: float | None = None) -> Verdict | None:
    """The first word, yes or no; where the probability of yes is known, a reply of other words will do."""
    found = _FIRST_WORD.match(reply)
    if found is None and probability is None:
        return None
    says_yes = found[1].lower() == "yes" if found else (probability or 0.0) >= 0.5
    return Verdict(float(says_yes), probability=probability)


def _picture_values(verdicts: Sequence[Verdict]) -> dict[str, Reported]:
    probable = [one.probability for one in verdicts if one.probability is not None]
    if verdicts and len(probable) == len(verdicts):
        return {"probability of yes": _mean(probable)}
    return _share("share of yes", verdicts)


def _filled(text: str, fields: Mapping[str, str]) -> str:
    """A text with fields in their places; what the fields hold is left as it is."""
    return re.sub("|".join(fields), lambda found: fields[found[0]], text)


RULES = {
    rule.name: rule
    for rule in (
        JudgeRule(
            "mmvet", "MM-Vet's prompt", _mmvet_messages, read_mmvet, _mmvet_values, 128, MMVET_CAPABILITIES
        ),
        JudgeRule("video", "Video-ChatGPT's prompt", _video_messages, read_video, _video_values, 64),
        JudgeRule(
            "picture", "VQAScore's question", _picture_messages, read_yes_no, _picture_values, 16,
            ("basic", "advanced"), asks_probability=True, needs_label=False,
        ),
    )
}  # fmt: skip
"""By name."""
