"""Answers graded by a model behind a server, the judge, for `tools/evaluate.py score --judge-url`.

Verdicts are kept below the folder of the answers, `judged/JUDGE.jsonl`: JSON lines `{"key", "task", "judge", "asked",
"reply", ...}`, appended batch by batch. "asked" is a digest of all that the judge was given, the answer among it. A
verdict is asked for once; a file holds those of one judge.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.report import MOST_ERRORS
from megatron_eve.evaluation.requests import Request
from megatron_eve.evaluation.scorers.judged import (
    RULES,
    JudgeRow,
    JudgeRule,
    Verdict,
    check_labels,
    judged_values,
)
from megatron_eve.inference.http_client import HTTPClient, ServerError, TooLong
from megatron_eve.inference.http_engine import at_once, data_url
from megatron_eve.inference.questions import open_locked

TRIES = 4
"""Times that an answer is sent to the judge until a reply can be read; the temperature grows from 0 by 0.5."""
IN_FLIGHT = 16
"""Answers that the judge has at once; their verdicts are on disk before the next are sent."""
FOLDER = "judged"
"""Of the verdicts, below that of the answers."""
_ALTERNATIVES = 5  # tokens of which probabilities are asked for, as many as all servers give
_BEGINS = b'{"key": '


def check_judge_flags(
    url: str | None, model: str | None, tasks: Sequence[str], judged: Sequence[str]
) -> None:
    """Refuse flags that do not go together.

    Args:
        url, model: --judge-url and --judge-model.
        tasks: that are scored.
        judged: those of them whose answers a judge can grade.

    Raises:
        ConfigError: naming the flag.
    """
    if model and not url:
        raise ConfigError("--judge-model: is the name of a server's model and goes with --judge-url")
    if url and not judged:
        raise ConfigError(
            f"--judge-url: no judge is asked about {', '.join(tasks)}; leave it out (docs/evaluation.md says which "
            "tasks have a judge's prompt)"
        )


@dataclass(frozen=True)
class Reply:
    """What a judge said.

    Attributes:
        text: the last reply.
        probability: of yes in place of it; None where the rule does not ask, or the server does not say.
        error: why there is no reply.
    """

    text: str = ""
    probability: float | None = None
    error: str | None = None


class Judge:
    """A model that grades answers.

    Args:
        url: of a server with OpenAI's interface, up to and with /v1.
        model: the name that the server gives its model; None: the only one that it lists.
        client: asks the server.

    Raises:
        ServerError: it cannot be reached, or which of its models is meant is not clear.
    """

    def __init__(self, url: str, model: str | None, client: HTTPClient | None = None) -> None:
        self._client = client or HTTPClient(url, flag="--judge-url", model_flag="--judge-model")
        served = self._client.served_models()
        if served is not None and model is not None and model not in served:
            raise self._client.no_such_model(model, served)
        if model is None and (served is None or len(served) != 1):
            what = (
                "does not list its models"
                if served is None
                else f"serves {', '.join(sorted(served)) or 'none'}"
            )
            raise ServerError(
                f"{self._client.place}: {what}; name one with --judge-model, and check the address, which mostly ends "
                "in /v1"
            )
        self.model = model if model is not None else next(iter(served or {}))

    def ask(self, rule: JudgeRule, row: JudgeRow) -> Reply:
        """Ask until a reply can be read, at most `TRIES` times; the last one is returned.

        Raises:
            ServerError: the server does not answer, or refuses.
        """
        messages = _messages(rule, row)
        reply = Reply()
        for number in range(TRIES):
            body = {
                "model": self.model,
                "messages": messages,
                "max_tokens": rule.max_tokens,
                "temperature": 0.5 * number,
            }
            if rule.asks_probability:
                body |= {"logprobs": True, "top_logprobs": _ALTERNATIVES}
            try:
                found = self._client.post("/chat/completions", body)
            except TooLong as error:
                return Reply(error=f"prompt_too_long: {error}")
            text = self._client.first_choice(found, "message", "content")
            text = text if isinstance(text, str) else ""
            reply = Reply(text, _probability_of_yes(found) if rule.asks_probability else None)
            if rule.read(reply.text, reply.probability) is not None:
                break
        return reply


def judge_answers(
    measured: Sequence[Measured], requests: Sequence[Request], judge: Judge, answers: Path
) -> tuple[list[Measured], list[str]]:
    """All values, those of the judge behind each task's own, and the tasks of which it left too many ungraded.

    Args:
        measured: values of all tasks; those with `judged` are graded.
        requests: of all tasks.
        judge: grades.
        answers: folder of the answers, which gets the verdicts.

    Raises:
        UserError: a label that cannot be graded, a picture that is missing, or the server's error.
    """
    for one in measured:
        if one.judged:
            check_labels(one.task, RULES[one.judge_rule], one.judged)
    found: list[Measured] = []
    in_doubt = []
    with VerdictFile(answers / FOLDER / _file_name(judge.model), judge.model) as file:
        for one in measured:
            found.append(one)
            if one.judged:
                asked = [request for request in requests if request.task == one.task]
                verdicts = _verdicts(one, asked, judge, file)
                ungraded = [
                    row.answer is not None and said is None
                    for row, said in zip(one.judged, verdicts, strict=True)
                ]
                if sum(ungraded) > MOST_ERRORS * len(ungraded):
                    in_doubt.append(one.task)
                found += _values(one, verdicts, judge.model)
    return found, in_doubt


def _values(one: Measured, verdicts: Sequence[Verdict | None], model: str) -> list[Measured]:
    rule = RULES[one.judge_rule]
    return [
        Measured(
            one.task,
            f"{name}, judged by {model}" if name else f"judged by {model}",
            value.value,
            value.standard_error,
            value.n,
            f"{rule.protocol}, judge {model}",
            False,
            tuple(f"judged by {model}: {note.count:,} {note.what}: {note.why}" for note in value.left_out),
            judge=model,
        )
        for name, value in judged_values(rule, one.judged, verdicts).items()
    ]


def _verdicts(
    one: Measured, asked: Sequence[Request], judge: Judge, file: VerdictFile
) -> list[Verdict | None]:
    """The verdict of each row, of which those that are not on disk are asked for."""
    from tqdm import tqdm

    rule = RULES[one.judge_rule]
    given = [
        (request, row, _digest(rule, row))
        for request, row in zip(asked, one.judged, strict=True)
        if row.answer is not None
    ]
    missing = [
        (request, row, digest) for request, row, digest in given if (request.key, digest) not in file.found
    ]
    try:
        with tqdm(total=len(missing), desc=f"{one.task}, judge", disable=not missing) as bar:
            for start in range(0, len(missing), IN_FLIGHT):
                batch = missing[start : start + IN_FLIGHT]
                replies = at_once(lambda each: judge.ask(rule, each[1]), batch)
                file.append(
                    (request, digest, reply)
                    for (request, _, digest), reply in zip(batch, replies, strict=True)
                )
                bar.update(len(batch))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped; the same command goes on with the verdicts that are missing"
        ) from None
    said = {request.key: file.found[request.key, digest] for request, _, digest in given}
    return [
        _read(rule, said[request.key]) if row.answer is not None else None
        for request, row in zip(asked, one.judged, strict=True)
    ]


def _read(rule: JudgeRule, reply: Reply) -> Verdict | None:
    return None if reply.error is not None else rule.read(reply.text, reply.probability)


class VerdictFile:
    """The verdicts of a judge on disk. A context manager: it locks the file, and closes it.

    Args:
        path: the file; it and its folder are made where they are missing.
        judge: the name of the judge's model.

    Attributes:
        found: reply by the request's key and the digest of what was asked.

    Raises:
        DataError: another process writes it, or a line that is no verdict of this judge. The file is left as it is.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self._path, self._judge = path, judge
        self.found: dict[tuple[str, str], Reply] = {}
        self._file = open_locked(
            path, f"{path}: another process asks this judge about the same answers; wait for it"
        )
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                if row["judge"] != self._judge:
                    raise ValueError
                reply = Reply(row["reply"], row["probability"], row["error"])
                self.found.setdefault((row["key"], row["asked"]), reply)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DataError(
                    f"{self._path}, line {number}: not a verdict of {self._judge}; remove that line, or the file"
                ) from None
        if torn := content[whole:]:  # cut off in the middle of a write
            if not (torn.startswith(_BEGINS) or _BEGINS.startswith(torn) or not torn.strip(b"\0")):
                raise DataError(f"{self._path}: not a file of verdicts; remove it")
            self._file.truncate(whole)

    def __enter__(self) -> VerdictFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, given: Iterable[tuple[Request, str, Reply]]) -> None:
        """Append verdicts (request, digest of what was asked, reply), and flush them to disk."""
        lines = []
        for request, digest, reply in given:
            self.found[request.key, digest] = reply
            row = {
                "key": request.key,
                "task": request.task,
                "judge": self._judge,
                "asked": digest,
                "reply": reply.text,
                "probability": reply.probability,
                "error": reply.error,
            }
            lines.append(json.dumps(row) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _file_name(model: str) -> str:
    """A name of letters that all file systems take, another one for each model."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip(".")[:60]
    return f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.jsonl"


def _messages(rule: JudgeRule, row: JudgeRow) -> list[dict[str, Any]]:
    """The messages of a chat; the picture stands in front of the last text."""
    # Half of a surrogate pair cannot be sent.
    texts = [(role, text.encode("utf-8", "replace").decode()) for role, text in rule.messages(row)]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in texts]
    if row.picture is not None:
        try:
            url = data_url(_picture(row.picture))
        except SkipRow as error:
            raise _unreadable(row.picture, str(error)) from None
        messages[-1]["content"] = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": texts[-1][1]},
        ]
    return messages


def _picture(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from None


def _unreadable(path: Path, reason: str) -> DataError:
    return DataError(
        f"--answers: the picture {path} cannot be read ({reason}); remove the line of its answer, and run "
        "tools/evaluate.py answer again"
    )


def _digest(rule: JudgeRule, row: JudgeRow) -> str:
    digest = hashlib.sha256(json.dumps([rule.name, rule.max_tokens, rule.messages(row)]).encode())
    if row.picture is not None:
        digest.update(hashlib.sha256(_picture(row.picture)).digest())
    return digest.hexdigest()[:32]


def _probability_of_yes(reply: Any) -> float | None:
    """From the alternatives of the first token that is no space; None where neither yes nor no is among them."""
    try:
        for token in reply["choices"][0]["logprobs"]["content"]:
            if not token["token"].strip():
                continue
            said = {"yes": 0.0, "no": 0.0}
            seen = False
            for one in token["top_logprobs"]:
                word = one["token"].strip().lower()
                if word in said:
                    said[word] += math.exp(one["logprob"])
                    seen = True
            return min(1.0, said["yes"]) if seen else None
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
        return None  # logprobs are an extension that servers may leave out
    return None
