"""The tasks of this project, run by lmms-eval on toy datasets: prompts letter by letter, scores worked out by hand."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import stdev
from typing import Any

import pyarrow.parquet
import pytest

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.evaluation.answers import Answered
from megatron_eve.evaluation.data_root import check_dataset
from megatron_eve.evaluation.harnesses import GROUPS
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.report import write_submissions
from megatron_eve.evaluation.requests import Request
from megatron_eve.evaluation.scorers.scores import NoAnswer, answer_of
from megatron_eve.evaluation.scorers.vqa import vqa_accuracy
from megatron_eve.evaluation.text_tasks import TEXT_TASKS
from tests.evaluation import toy_data
from tests.evaluation.hub_folder import picture, write_split

pytest.importorskip("lmms_eval")
from megatron_eve.evaluation.tasks import documents
from megatron_eve.evaluation.vision_harness import VisionHarness

HUB = toy_data.OWNER
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

CAPTION = "Provide a one-sentence caption for the provided image."

# Task -> the first question as it is asked.
PROMPTS = {
    "eve_pope": f"Is there a cat in the image?{SHORT}",
    "quick_pope": f"Is there a cat in the image?{SHORT}",
    "eve_mme": f"Is this shown in existence/1.jpg?{SHORT}",
    "eve_textvqa": f"what does the Sign say?\nReference OCR token: STOP, 4-way{SHORT}",
    "eve_textvqa_no_ocr": f"what does the Sign say?{SHORT}",
    "quick_textvqa": f"what does the Sign say?\nReference OCR token: STOP, 4-way{SHORT}",
    "eve_vqav2_val": f"How many cats?{SHORT}",
    "eve_vqav2_test": f"What is it 0?{SHORT}",
    "eve_vqav2_testdev": f"What is it 1?{SHORT}",
    "eve_vizwiz_val": "Ok. What is this?\nWhen the provided information is insufficient, respond with "
    f"'Unanswerable'.{SHORT}",
    "eve_vizwiz_test": "What is it?\nWhen the provided information is insufficient, respond with "
    f"'Unanswerable'.{SHORT}",
    "eve_gqa": f"Is it a dog?{SHORT}",
    "eve_sqa_img": f"Which state is farthest north?\nA. Ohio\nB. Maine{LETTER}",
    "eve_sqa": f"Which state is farthest north?\nA. Ohio\nB. Maine{LETTER}",
    "eve_sqa_text": f"Which word rhymes?\nA. hat\nB. dog{LETTER}",
    "quick_sqa": f"Which state is farthest north?\nA. Ohio\nB. Maine{LETTER}",
    "eve_mmbench_en": f"Look.\nWhat is it?\nA. cat\nB. dog\nC. cup\nD. hat{LETTER}",
    "eve_mmbench_cn": "Look.\nWhat is it?\nA. cat\nB. dog\nC. cup\nD. hat\n请直接回答选项字母。",
    "eve_seed_image": f"What is in image 0?\nA. One\nB. Two\nC. Three\nD. Four{LETTER}",
    "eve_mmvet": "What is x in equation 0?",
    "vila_okvqa": f"What sport is 0?{SHORT}",
    "vila_okvqa_4shot": f"What sport is 0?{SHORT}",
    "vila_coco_karpathy": CAPTION,
    "vila_coco_karpathy_4shot": CAPTION,
    "vila_u_msvd_qa": "what is a man playing?",
    "vila_u_msrvtt_qa": "what is a man playing?",
}
TASKS = list(PROMPTS)
VIDEOS = ("vila_u_msvd_qa", "vila_u_msrvtt_qa")
# Task -> what the model says to its questions in order; None: nothing, as for a picture that cannot be decoded.
SAID: dict[str, list[str | None]] = {
    "eve_pope": ["Yes", "No", "No", "Yes, there is one.", "Yes", "NO"],
    "eve_mme": ["Yes", "Not at all", "I think yes", "no.", "y", "No"],
    "eve_textvqa": ["Stop.", "nokia"],
    "eve_vqav2_val": ["two", "zebra", None],
    "eve_vqav2_test": ["The two-way.", None],
    "eve_vqav2_testdev": ["The two-way."],
    "eve_vizwiz_val": ["Unanswerable", "red"],
    "eve_vizwiz_test": ["The Coke", None],
    "eve_gqa": ["Yes.", "the dog", "dog"],
    "eve_sqa_img": ["B", "The answer is A.", "b"],
    "eve_sqa": ["B", None, "The answer is A.", "b"],
    "eve_sqa_text": ["A. hat"],
    "eve_mmbench_en": ["B", "A. dog", "(D)", "a dog is there", "A", "A"],
    "eve_mmbench_cn": ["B", "A", "D", "B", "yes", "B."],
    "eve_seed_image": ["A", "A."],
    "eve_mmvet": ["x = -1", "The answer."],
    "vila_okvqa": ["golf", "a golf"],
    "vila_okvqa_4shot": ["golf", None],
    "vila_coco_karpathy": ["A cat sits on a mat", "a dog", "Two dogs run!"],
    "vila_coco_karpathy_4shot": ["A cat sits on a mat", None, "Two dogs run!"],
    "vila_u_msvd_qa": ["Guitar.", "an onion", "horse"],
    "vila_u_msrvtt_qa": ["The man is playing a guitar.", None, " horse. "],
}
SAID |= {f"quick_{name}": SAID[f"eve_{name}"] for name in ("pope", "textvqa")}
SAID |= {"eve_textvqa_no_ocr": SAID["eve_textvqa"], "quick_sqa": SAID["eve_sqa_img"]}
# Task -> metric -> value.
#   POPE: random all right (F1 100), popular all wrong (0), adversarial "NO" read as yes (TP 1, FP 1: 2 / 3).
#   MME: existence three of four right (75 + 50), code_reasoning all (100 + 100).
#   VQA: four who said it 1, three 0.9, two 0.6, one 0.3, nobody 0.
POPE = {
    "f1": (100 + 0 + 200 / 3) / 3, "f1_random": 100, "f1_popular": 0, "f1_adversarial": 200 / 3, "accuracy": 50,
    "precision": 50, "recall": 200 / 3, "yes_ratio": 400 / 6,
}  # fmt: skip
VALUES: dict[str, dict[str, float]] = {
    "eve_pope": POPE,
    "quick_pope": POPE,
    "eve_mme": {"perception": 125, "cognition": 200, "existence": 125, "code_reasoning": 200},
    "eve_textvqa": {"accuracy": (100 + 60) / 2},
    "eve_textvqa_no_ocr": {"accuracy": (100 + 60) / 2},
    "quick_textvqa": {"accuracy": (100 + 60) / 2},
    "eve_vqav2_val": {"accuracy": (90 + 0 + 0) / 3},
    "eve_vizwiz_val": {"accuracy": (100 + 30) / 2},
    "eve_gqa": {"accuracy": 200 / 3},
    "eve_sqa_img": {"accuracy": 200 / 3},
    "eve_sqa": {"accuracy": 50},
    "eve_sqa_text": {"accuracy": 100},
    "quick_sqa": {"accuracy": 200 / 3},
    # The second question: two options, "A" to both rotations is wrong once.
    "eve_mmbench_en": {"accuracy": 50, "accuracy_object_localization": 100, "accuracy_image_style": 0},
    "eve_mmbench_cn": {"accuracy": 50, "accuracy_object_localization": 0, "accuracy_image_style": 100},
    "eve_seed_image": {"accuracy": 50},
    "vila_okvqa": {"accuracy": (100 + 90) / 2},
    "vila_okvqa_4shot": {"accuracy": 50},
    "vila_u_msvd_qa": {"accuracy": 200 / 3},
    "vila_u_msrvtt_qa": {"accuracy": 100 / 3},
}
FILES: dict[str, Any] = {
    "eve_vqav2_test": [{"question_id": 200, "answer": "2 way"}, {"question_id": 201, "answer": ""}],
    "eve_vqav2_testdev": [{"question_id": 201, "answer": "2 way"}, {"question_id": 200, "answer": ""}],
    "eve_vizwiz_test": [
        {"image": "VizWiz_test_00000000.jpg", "answer": "coke"},
        {"image": "VizWiz_test_00000001.jpg", "answer": ""},
    ],
    "eve_mmvet": {"v1_0": "x = -1", "v1_1": "The answer."},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data_root")
    toy_data.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copies")


@pytest.fixture(scope="module")
def harness(root: Path) -> VisionHarness:
    return VisionHarness(root)


@pytest.fixture(scope="module")
def plan(harness: VisionHarness, copies: Path) -> dict[str, list[Request]]:
    return {task: harness.plan(task, copies) for task in TASKS}


def answers(plan: Mapping[str, Sequence[Request]], task: str) -> dict[str, Answered]:
    said = zip(plan[task], SAID[task], strict=True)
    return {
        one.key: Answered(text) if text is not None else Answered(error="image_unreadable: x")
        for one, text in said
    }


@pytest.fixture(scope="module")
def scored(
    harness: VisionHarness, plan: dict[str, list[Request]], copies: Path
) -> Callable[[str], dict[str, Measured]]:
    """Values of a task by metric, worked out when they are first asked for."""

    @cache
    def values(task: str) -> dict[str, Measured]:
        return {one.metric: one for one in harness.score(task, copies, answers(plan, task))[0]}

    return values


def test_each_task_is_tried_here(harness: VisionHarness) -> None:
    own = [name for name in harness.own_names() if not harness.is_group(name)]
    assert sorted(own) == sorted(TASKS)
    assert {name for group in ("eve_table", "quick", "vila_table") for name in harness.tasks(group)} <= set(
        TASKS
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_first_question_as_it_is_asked(task: str, plan: dict[str, list[Request]]) -> None:
    first = plan[task][0]
    assert (len(plan[task]), first.context) == (len(SAID[task]), PROMPTS[task])
    assert (first.max_new_tokens, first.stop) == (1024 if "mmbench" in task else 128, ())
    assert first.conversation is not None
    shown = first.conversation()
    if task.endswith("_4shot"):
        assert len(shown.images) == 5 and shown.turns[-1].text == f"<image>\n{PROMPTS[task]}"
    else:
        assert [turn.text for turn in shown.turns] == [PROMPTS[task]]  # the picture stands in front
        assert len(shown.images) == (8 if task in VIDEOS else task != "eve_sqa_text")


@pytest.mark.parametrize("task", sorted(VALUES))
def test_the_values_of_the_table(task: str, scored: Callable[[str], dict[str, Measured]]) -> None:
    found = scored(task)
    assert {name: one.value for name, one in found.items()} == pytest.approx(VALUES[task])
    assert [name for name, one in found.items() if one.main] == [next(iter(VALUES[task]))]
    assert {one.protocol[:3] for one in found.values()} == {"VIL" if task.startswith("vila") else "EVE"}


@pytest.mark.parametrize("task", sorted(FILES))
def test_files_for_a_server_have_no_score(task: str, scored: Callable[[str], dict[str, Measured]]) -> None:
    (one,) = scored(task).values()
    assert (one.metric, one.value, one.n, one.main) == ("submission", None, len(SAID[task]), True)


def test_the_file_of_test_dev_says_what_it_fills_and_what_it_lacks(
    root: Path, scored: Callable[[str], dict[str, Measured]], tmp_path: Path
) -> None:
    (note,) = scored("eve_vqav2_testdev")["submission"].notes
    assert note == "1 questions: of the split test, not of test-dev: not asked, an empty text in the file"
    copy_of(root, "VQAv2", tmp_path)
    for path in (tmp_path / HUB / "VQAv2").rglob("test-*"):
        path.unlink()
    rewritten(tmp_path, "VQAv2", "testdev")  # and its README
    other = VisionHarness(tmp_path)
    requests = other.plan("eve_vqav2_testdev", tmp_path / "copies")
    found = {one.key: Answered("no") for one in requests}
    ((one,), _) = other.score("eve_vqav2_testdev", tmp_path / "copies", found)
    assert one.submission == [{"question_id": 201, "answer": "no"}] and one.n == 1
    assert one.notes[0].startswith(
        "1 split: VQAv2's test is not there: the file has the questions of test-dev"
    )


def test_content_of_the_files(scored: Callable[[str], dict[str, Measured]], tmp_path: Path) -> None:
    values = [
        scored(task)[name]
        for task, name in (*((task, "submission") for task in FILES), ("eve_gqa", "accuracy"))
    ]
    written = write_submissions(tmp_path / "new" / "stage3.json", values)
    assert [path.name for path in written] == [f"stage3.{task}.json" for task in FILES]
    assert [json.loads(path.read_text()) for path in written] == list(FILES.values())


def test_forgetting_has_science_qa(harness: VisionHarness) -> None:
    (group,) = set(GROUPS["forgetting"]) - set(TEXT_TASKS)
    assert harness.tasks(group) == ["eve_sqa", "eve_sqa_text"]


def test_standard_errors_and_counts(scored: Callable[[str], dict[str, Measured]]) -> None:
    """Of 1.0 and 0.6: s = 0.2828, divided by the root of two 0.2; F1 and the points of MME have none."""
    accuracy = scored("eve_textvqa")["accuracy"]
    assert accuracy.standard_error == pytest.approx(20) and accuracy.n == 2
    assert scored("eve_sqa_text")["accuracy"].standard_error is None  # of one question
    assert scored("eve_pope")["f1"].standard_error is None and scored("eve_pope")["f1_random"].n == 2
    assert scored("eve_mme")["perception"].n == 4 and scored("eve_mme")["cognition"].n == 2
    assert scored("eve_mmbench_en")["accuracy"].n == 2


def test_an_answer_that_does_not_exist_is_told(scored: Callable[[str], dict[str, Measured]]) -> None:
    (note,) = scored("eve_vqav2_val")["accuracy"].notes
    assert note == "1 answers: the model gave none: scored as wrong"
    assert any("the model gave none" in note for note in scored("eve_sqa")["accuracy"].notes)
    assert scored("eve_vqav2_test")["submission"].notes


def test_no_answer_stays_one_when_it_is_stripped() -> None:
    """lmms-eval strips each answer on its way to the task."""
    assert answer_of([NoAnswer().strip()]) is None and answer_of(["".strip()]) == ""


def test_gqa_shows_the_picture_of_the_question(plan: dict[str, list[Request]]) -> None:
    shades = []
    for request in plan["eve_gqa"]:
        assert request.conversation is not None
        shades.append(request.conversation().images[0][-1])
    assert shades == [100, 200, 100]


def test_shots_come_with_their_pictures(plan: dict[str, list[Request]]) -> None:
    """The same four of five training examples, in front of each question."""
    for task, first, asked in (
        ("vila_coco_karpathy_4shot", 80, [CAPTION] * 5),
        ("vila_okvqa_4shot", 60, [f"What is made of {{}}?{SHORT}"] * 4 + [PROMPTS["vila_okvqa"]]),
    ):
        conversations = []
        for request in plan[task]:
            assert request.conversation is not None
            conversations.append(request.conversation())
        one = conversations[0]
        shots = [image[-1] - first for image in one.images[:4]]
        assert len(set(shots)) == 4 and set(shots) < set(range(5))
        answers = [f"picture {shot}" if "coco" in task else f"wood {shot}" for shot in shots]
        questions = [f"<image>\n{text.format(shot)}" for text, shot in zip(asked, [*shots, 0], strict=True)]
        assert [turn.text for turn in one.turns if turn.role == "human"] == questions
        assert [turn.text for turn in one.turns if turn.role == "gpt"] == answers
        assert all(other.images[:4] == one.images[:4] for other in conversations)
        assert len({other.images[4] for other in conversations}) == len(conversations)


def copy_of(root: Path, folder: str, tmp_path: Path) -> Path:
    shutil.copytree(root / HUB / folder, tmp_path / HUB / folder)
    return tmp_path


def rewritten(root: Path, folder: str, split: str, config: str | None = None, **first: Any) -> None:
    """Write a split again with other values in its first row."""
    (path,) = (root / HUB / folder).glob(f"{config or 'data'}/{split}-*")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[0] |= first
    write_split(root / HUB / folder, split, rows, config)


REFUSED: dict[str, tuple[str, str, str | None, str, dict[str, Any]]] = {
    "POPE's label": ("eve_pope", "POPE", None, "eve_pope, question 0: the label is 'maybe'", {"answer": "maybe"}),
    "three questions to a picture": (
        "eve_mme", "MME", None, r"eve_mme, picture existence/2.jpg of existence: has 3 questions instead of 2",
        {"question_id": "existence/2.jpg"}),
    "nine answers": (
        "eve_textvqa", "textvqa", None, "eve_textvqa, question 34602: has 9 answers of people instead of 10",
        {"answers": ["stop"] * 9}),
    "a missing rotation": (
        "eve_mmbench_en", "MMBench", "en", "eve_mmbench_en, question 3: has 4 options, but row 1000003", {"index": 3}),
    "SEED's label": ("eve_seed_image", "SEED-Bench", None, "eve_seed_image, question 0: the label is 'E'",
        {"answer": "E"}),
    "ScienceQA's label": (
        "eve_sqa_img", "ScienceQA", "ScienceQA-IMG", "eve_sqa_img, question Which state .*: the label is 5",
        {"answer": 5}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_a_scorer_cannot_take(
    case: str,
    root: Path,
    tmp_path: Path,
    harness: VisionHarness,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, folder, config, said, first = REFUSED[case]
    rewritten(copy_of(root, folder, tmp_path), folder, harness.needs(task)[0].split, config, **first)
    monkeypatch.setattr(harness, "_root", tmp_path)
    found = {one.key: Answered("A") for one in harness.plan(task, tmp_path / "copies")}
    with pytest.raises(DataError, match=f"^{said}"):
        harness.score(task, tmp_path / "copies", found)


def test_gqa_without_a_picture_of_a_question(
    root: Path, tmp_path: Path, harness: VisionHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten(
        copy_of(root, "GQA", tmp_path), "GQA", "testdev", "testdev_balanced_instructions", imageId="elsewhere"
    )
    monkeypatch.setattr(harness, "_root", tmp_path)
    with pytest.raises(DataError, match="eve_gqa, question q1: its picture elsewhere is not in the config"):
        harness.plan("eve_gqa", tmp_path / "copies")


def test_a_damaged_first_picture_costs_itself(
    root: Path, tmp_path: Path, harness: VisionHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval reads the first document when a task is loaded."""
    torn = {"bytes": picture(0)["bytes"][:60], "path": "torn.png"}
    rewritten(copy_of(root, "POPE", tmp_path), "POPE", "test", image=torn)
    monkeypatch.setattr(harness, "_root", tmp_path)
    first, second, *_ = harness.plan("eve_pope", tmp_path / "copies")
    assert first.conversation is not None and second.conversation is not None
    with pytest.raises(SkipRow, match="image_unreadable"):
        first.conversation()
    assert len(second.conversation().images) == 1


@pytest.mark.parametrize("task", TASKS)
def test_columns_of_each_task_are_checked(task: str, root: Path, harness: VisionHarness) -> None:
    metadata = harness.metadata(task)
    assert metadata["columns"] and metadata["scored"] in ("here", "server", "judge")
    for need in harness.needs(task):
        assert check_dataset(root, need)


def test_quick_asks_the_same_documents_again(tmp_path: Path) -> None:
    import datasets

    rows = [{"question_id": str(number), "category": "random"} for number in range(3_000)]
    everything = datasets.Dataset.from_list(rows)
    asked = documents.quick_pope(everything)["question_id"]
    assert 150 < len(asked) < 250 and list(asked) == list(documents.quick_pope(everything)["question_id"])
    assert list(asked)[:3] == [
        "5",
        "12",
        "24",
    ]  # a change of the hash would make scores of checkpoints incomparable


def test_quick_asks_a_small_dataset_whole(plan: dict[str, list[Request]]) -> None:
    assert [len(plan[task]) for task in ("quick_pope", "quick_textvqa", "quick_sqa")] == [6, 2, 3]


def test_vqa_accuracy_is_that_of_lmms_eval() -> None:
    """On 10,000 random answers; of VQAv2 but for ten equal ones, which the stock task compares as they stand."""
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    rng = random.Random(22)
    words = [
        "two",
        "2",
        "a",
        "the dog",
        "dont",
        "yes",
        "no.",
        "1,000",
        "t-shirt",
        "yes/no",
        "dog's",
        "none",
        "?",
        "ON",
    ]
    equal = 0
    for number in range(10_000):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4))]
        said, answer = rng.choices(texts, k=10), rng.choice(texts)
        stock = textvqa_process_results({"question_id": 1, "answers": list(said)}, [answer])["exact_match"]
        assert vqa_accuracy(answer, said) == pytest.approx(stock), (answer, said)
        if number % 10 == 0:
            if len(set(said)) == 1:
                equal += 1
                continue
            answers = [{"answer": one, "answer_id": place} for place, one in enumerate(said)]
            stock = vqav2_process_results_val({"question_id": 1, "answers": answers}, [answer])["exact_match"]
            assert vqa_accuracy(answer, said, "vqa_tool") == pytest.approx(stock), (answer, said)
    assert 0 < equal < 500


needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java: captions are not scored")


@pytest.mark.slow  # METEOR loads its tables for 10 s and more
@needs_java
def test_captions(scored: Callable[[str], dict[str, Measured]]) -> None:
    """Three captions, scored with the published code; tables print the scores times 100."""
    found = scored("vila_coco_karpathy")
    values = {name: one.value / 100 for name, one in found.items() if one.value is not None}
    assert values.pop("METEOR") > 0
    assert values == pytest.approx(
        {"CIDEr": 3.8381, "Bleu_1": 0.6921, "Bleu_2": 0.6790, "Bleu_3": 0.7054, "Bleu_4": 0.7190, "ROUGE_L": 0.7551},
        abs=5e-5,
    )  # fmt: skip
    error = stdev([616.74, 13.86, 520.83]) / 3**0.5
    assert found["CIDEr"].standard_error == pytest.approx(error, rel=1e-4) and found["CIDEr"].n == 3
    assert found["Bleu_4"].standard_error is None and found["CIDEr"].main


@pytest.mark.slow
@needs_java
def test_a_caption_that_does_not_exist(scored: Callable[[str], dict[str, Measured]]) -> None:
    lacking = scored("vila_coco_karpathy_4shot")["CIDEr"]
    assert lacking.value == pytest.approx((616.74 + 0 + 520.83) / 3, abs=0.01)
    assert lacking.notes == ("1 answers: the model gave none: scored as wrong",)


def test_captions_without_java(
    harness: VisionHarness, plan: dict[str, list[Request]], copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    values, _ = harness.score("vila_coco_karpathy", copies, answers(plan, "vila_coco_karpathy"))
    found = {one.metric: one for one in values}
    assert {one.value for one in found.values()} == {None} and len(found) == 7
    assert "needs the program java" in found["CIDEr"].notes[0]


def test_the_folders_that_the_hub_does_not_have(
    root: Path, tmp_path: Path, harness: VisionHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "yerevann", tmp_path / "yerevann")
    shutil.copytree(root / HUB / "OK-VQA", tmp_path / HUB / "OK-VQA")
    next((tmp_path / HUB / "OK-VQA").rglob("train2014-*")).unlink()
    rewritten(tmp_path, "OK-VQA", "val2014")  # and its README
    monkeypatch.setattr(harness, "_root", tmp_path)
    with pytest.raises(DataError, match=r"has no folder coco/val2014: unpack COCO's val2014.zip"):
        harness.plan("vila_coco_karpathy", tmp_path / "copies")
    with pytest.raises(DataError, match=r"lmms-lab-encoder/OK-VQA has no split train2014"):
        harness.plan("vila_okvqa_4shot", tmp_path / "copies")


OFFLINE = "import socket; socket.create_connection(('1.1.1.1', 53), 1)"


@pytest.mark.slow
def test_without_a_network() -> None:
    """All of the above in a network namespace that has no interface."""
    alone: Callable[[list[str]], subprocess.CompletedProcess[str]] = lambda command: subprocess.run(  # noqa: E731
        ["unshare", "--user", "--net", *command], capture_output=True, text=True
    )
    if shutil.which("unshare") is None or alone(["true"]).returncode:
        pytest.skip("unshare --user --net is not allowed here")
    assert "Network is unreachable" in alone([sys.executable, "-c", OFFLINE]).stderr
    chosen = "test_the_first_question or test_the_values"
    run = alone([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, __file__])
    assert run.returncode == 0, run.stdout[-3_000:]
