"""Replies of judges, and what is read in them."""

from __future__ import annotations

from typing import Any

from tests.evaluation.case import Case, Mutation

GRADES: list[tuple[str, float | None]] = [
    ("0.5", 0.5), (" 1.0\n", 1.0), ("1", 1.0), ("0", 0.0), ("0.0 |", 0.0), (".3", 0.3), ("0.75", 0.75), ("0.4.", 0.4),
    ("", None), ("1.1", None), ("-0.5", None), ("nan", None), ("1 of the two elements", None), ("0.5 0.6", None),
    ("Correctness: 0.5", None), ("1e-1", None), ("2", None), ("0.5 | 0.6", None), ("½", None),
]  # fmt: skip
VIDEOS: list[tuple[str, tuple[float, int] | None]] = [
    ("{'pred': 'yes', 'score': 4}", (1.0, 4)), ("{'pred': 'yes', 'score': 4.8}", (1.0, 4)),
    ('```python\n{"pred": "No", "score": 0}\n```', (0.0, 0)), ("{'score': 5, 'pred': 'yes'}", (1.0, 5)),
    ("Sure: {'pred': 'no', 'score': '2'}.", (0.0, 2)), ("{'pred': 'no', 'score': 0,}", (0.0, 0)),
    ("yes 4", None), ("{'pred': 'maybe', 'score': 4}", None), ("{'pred': 'yes', 'score': 6}", None),
    ("{'pred': 'yes', 'score': 5.5}", None), ("{'pred': 'yes', 'score': -1}", None), ("{'pred': 'yes'}", None),
    ("{'pred': 'yes', 'score': 4} {'pred': 'no', 'score': 1}", None), ("{'pred': 'yes', 'score': 44}", None),
    ("{'pred': 'yes', 'pred': 'no', 'score': 4}", None), ("", None), ("{'pred': 'yesterday', 'score': 1}", None),
    ("{'score': 3}", None), ("{'pred': 'no', 'score': 1, 'score': 5}", None),
]  # fmt: skip
PICTURES: list[tuple[str, float | None, tuple[float, float | None] | None]] = [
    ("Yes", None, (1.0, None)), ("no, there are two", None, (0.0, None)), ("\n**Yes**", 0.9, (1.0, 0.9)),
    ("There is one", 0.2, (0.0, 0.2)), ("There is one", 0.7, (1.0, 0.7)), ("There is one", None, None),
    ("Yesterday", None, None), ("", None, None), ("not", None, None), ("No", 0.6, (0.0, 0.6)),
    ("It is: yes", None, None), ("There is one", 0.0, (0.0, 0.0)),
]  # fmt: skip


def _two(verdict: Any, name: str) -> tuple[Any, Any] | None:
    return (verdict.points, getattr(verdict, name)) if verdict is not None else None


CASES = [
    Case("judged", f"MM-Vet {reply!r}", lambda m, r=reply: (v := m.read_mmvet(r)) and v.points, points)
    for reply, points in GRADES
]
CASES += [
    Case("judged", f"video {reply!r}", lambda m, r=reply: _two(m.read_video(r), "grade"), out)
    for reply, out in VIDEOS
]
CASES += [
    Case(
        "judged",
        f"picture {reply!r}, {share}",
        lambda m, r=reply, s=share: _two(m.read_yes_no(r, s), "probability"),
        out,
    )
    for reply, share, out in PICTURES
]
MUTATIONS = [
    Mutation("judged", "MM-Vet: the first word counts", "_NUMBER.fullmatch(", "_NUMBER.match("),
    Mutation("judged", "MM-Vet: a number anywhere", "_NUMBER.fullmatch(", "_NUMBER.search("),
    Mutation("judged", "MM-Vet: spaces count", "fullmatch(reply.strip())", "fullmatch(reply)"),
    Mutation("judged", "MM-Vet: above 1", r"1(?:\.0+)?", r"[1-9](?:\.\d+)?"),
    Mutation("judged", "MM-Vet: no bar behind it", r"\s*[.|]?", r"\.?"),
    Mutation("judged", "video: of several the first", "if len(found) != 1:", "if not found:"),
    Mutation("judged", "video: case counts", "(yes|no)['\"]\"\"\", re.I)", "(yes|no)['\"]\"\"\")"),
    Mutation("judged", "video: words that begin so", "(yes|no)['\"]\"\"\"", "(yes|no)\"\"\""),
    Mutation("judged", "video: two verdicts in one", "len(said) != 1", "not said"),
    Mutation("judged", "video: two grades in one", "len(grade) != 1", "not grade"),
    Mutation("judged", "video: above 5", " or float(grade[0]) > 5", ""),
    Mutation("judged", "video: rounded", "int(float(grade[0]))", "round(float(grade[0]))"),
    Mutation("judged", "video: no is yes", 'said[0].lower() == "yes"', "bool(said[0])"),
    Mutation("judged", "picture: words that begin so", r"(yes|no)\b", "(yes|no)"),
    Mutation("judged", "picture: a word anywhere", "_FIRST_WORD.match(reply)", "_FIRST_WORD.search(reply)"),
    Mutation("judged", "picture: the probability decides", 'found[1].lower() == "yes" if found', "False if False"),
    Mutation("judged", "picture: a probability does not help", "and probability is None:", "or False:"),
    Mutation("judged", "picture: the probability is lost", "probability=probability)", "probability=None)"),
]  # fmt: skip
