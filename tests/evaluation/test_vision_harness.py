"""lmms-eval between the requests and the answers: stock POPE planned, answered by a rule, and scored."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.text.turns import Turn
from megatron_eve.evaluation.answers import Answered, MissingAnswers
from megatron_eve.evaluation.data_root import check_dataset, check_space, data_digest
from megatron_eve.evaluation.harnesses import Harnesses
from megatron_eve.evaluation.requests import Conversation
from tests.evaluation.hub_folder import picture, write_pope, write_split

pytest.importorskip("lmms_eval")
from megatron_eve.evaluation.vision_harness import VisionHarness, conversation_of, picture_file

POPE = "lmms-lab-encoder/POPE"


@pytest.fixture(scope="module")
def index() -> VisionHarness:
    """Its list of tasks takes seconds; the data root of each test is set below."""
    return VisionHarness(Path())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pope(tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def pope(root: Path, index: VisionHarness, monkeypatch: pytest.MonkeyPatch) -> Harnesses:
    monkeypatch.setattr(index, "_root", root)
    monkeypatch.setattr(Harnesses, "vision", index)
    harnesses = Harnesses(["pope"], root)
    harnesses.check_data(root.parent / "cache")
    return harnesses


def test_a_plan_is_what_the_task_file_asks(
    pope: Harnesses, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")  # of the engine; lmms-eval would take a quarter of the requests
    before, listing = Path.cwd(), sorted(root.rglob("*"))
    plan = pope.plan()
    assert Path.cwd() == before and os.environ["RANK"] == "1" and sorted(root.rglob("*")) == listing
    assert [one.doc_id for one in plan] == list(range(6)) and len({one.key for one in plan}) == 6
    one = plan[3]
    asked = "Is there a thing 3 in the image?\nAnswer the question using a single word or phrase."
    assert (one.task, one.split, one.number, one.kind) == ("pope", "test", 0, "generate")
    assert (one.context, one.max_new_tokens, one.stop) == (asked, 128, ("\n\n",))
    assert one.conversation is not None
    shown = one.conversation()
    assert shown.turns == (Turn("human", asked),)
    (file,) = shown.images
    assert file.startswith(b"P6\n60 40\n255\n")
    assert np.array_equal(np.asarray(Image.open(BytesIO(file))), np.full((40, 60, 3), 60))


def test_scores_are_those_of_the_stock_task(pope: Harnesses) -> None:
    """Labels no yes no yes no yes; the answers give TP 2, FP 1, TN 1, FN 1, and one that is neither."""
    said = ["no", "Yes", "Yes", "yes", "perhaps", "No"]
    found = {one.key: Answered(text) for one, text in zip(pope.plan(), said, strict=True)}
    measured, requests = pope.score(found)
    values = {one.metric: one.value for one in measured}
    assert values == pytest.approx({
        "pope_accuracy": 3 / 6, "pope_precision": 2 / 3, "pope_recall": 2 / 3, "pope_f1_score": 2 / 3,
        "pope_yes_ratio": 0.5,
    })  # fmt: skip
    assert [one.main for one in measured] == [True, False, False, False, False]
    assert {(one.n, one.protocol, one.standard_error) for one in measured} == {(6, "lmms-eval", None)}
    assert len(requests) == 6


def test_changed_data_is_not_taken_from_a_copy(pope: Harnesses, root: Path) -> None:
    """As `datasets` does it for a folder of the same relative path."""
    assert len(pope.plan()) == 6
    write_pope(root, 4)
    pope.check_data(root.parent / "cache")
    assert len(pope.plan()) == 4


def test_an_answer_that_does_not_exist_is_wrong(pope: Harnesses) -> None:
    found = {one.key: Answered("Yes") for one in pope.plan()}
    found[pope.plan()[1].key] = Answered(error="prompt_too_long: 9 tokens")
    assert pope.score(found)[0][0].value == pytest.approx(2 / 6)


def test_no_score_while_answers_are_missing(pope: Harnesses) -> None:
    found = {one.key: Answered("Yes") for one in pope.plan()[:4]}
    with pytest.raises(MissingAnswers, match=r"^pope 2$") as raised:
        pope.score(found)
    assert raised.value.counts == {"pope": 2}


def test_a_picture_that_cannot_be_decoded_costs_itself(root: Path, pope: Harnesses) -> None:
    path = next(root.rglob("*.parquet"))
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[2]["image"] = {"bytes": picture(0)["bytes"][:60], "path": "torn.png"}
    write_split(root / POPE, "test", rows)
    pope.check_data(root.parent / "cache")
    plan = pope.plan()
    for row, one in enumerate(plan):
        assert one.conversation is not None
        if row == 2:
            with pytest.raises(SkipRow, match="image_unreadable"):
                one.conversation()
        else:
            assert len(one.conversation().images) == 1
    assert pope.score({one.key: Answered("yes") for one in plan})[0][0].value == pytest.approx(0.5)


def test_a_label_that_a_stock_task_cannot_take(root: Path, pope: Harnesses) -> None:
    rows = pyarrow.parquet.read_table(next(root.rglob("*.parquet"))).to_pylist()
    rows[2]["answer"] = "maybe"
    write_split(root / POPE, "test", rows)
    pope.check_data(root.parent / "cache")
    plan = pope.plan()
    with pytest.raises(DataError, match=r"--tasks pope: lmms-eval could not .* \(AssertionError: "):
        pope.score({one.key: Answered("yes") for one in plan})


class TestDatasets:
    """What is said before a harness loads anything."""

    def refused(self, root: Path, harnesses: Harnesses, said: str) -> None:
        with pytest.raises(DataError, match=said):
            harnesses.check_data(root.parent / "cache")

    def test_no_folder(self, root: Path, pope: Harnesses) -> None:
        (root / POPE).rename(root / "elsewhere")
        self.refused(
            root,
            pope,
            f"--tasks pope: --data-root {root} has no folder {POPE}: copy the dataset there, as the",
        )

    def test_no_split(self, root: Path, pope: Harnesses) -> None:
        next(root.rglob("*.parquet")).unlink()
        write_pope(root, split="val")
        self.refused(root, pope, f"{POPE} has no split test; there are val")

    def test_no_file(self, root: Path, pope: Harnesses) -> None:
        next(root.rglob("*.parquet")).unlink()
        self.refused(
            root, pope, rf"{POPE} has no file data/test-\*; parquet files are in none of its folders"
        )

    def test_no_config(self, root: Path, index: VisionHarness, pope: Harnesses) -> None:
        assert pope.vision is index
        self.refused(root, Harnesses(["pope_adv"], root), f"{POPE} has no config Full; there are default")

    def test_a_readme_that_is_not_yaml(self, root: Path, pope: Harnesses) -> None:
        (root / POPE / "README.md").write_text("---\nconfigs: [\n---\n")
        self.refused(root, pope, r"README\.md is not YAML")

    def test_a_folder_without_a_readme(self, root: Path, pope: Harnesses) -> None:
        (root / POPE / "README.md").unlink()
        assert [path.name for need in pope.needs("pope") for path in check_dataset(root, need)] == [
            "test-00000-of-00001.parquet"
        ]

    def test_no_such_task(self, root: Path, pope: Harnesses) -> None:
        assert pope.tasks == ["pope"]
        with pytest.raises(
            ConfigError, match=r"--tasks popr: no such task or group; did you mean .*pope.*list shows them"
        ):
            Harnesses(["popr"], root)

    def test_no_room_for_the_copy(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = {"digest": list(root.rglob("*.parquet"))}
        check_space(tmp_path / "cache", files)
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(
            ConfigError, match=r"--data-cache-path .*cache: datasets of 0\.0 GB are copied there"
        ):
            check_space(tmp_path / "cache", files)

    def test_the_digest_is_of_names_sizes_and_first_bytes(self, root: Path) -> None:
        folder = root / POPE
        first = data_digest(folder)
        (folder / ".cache").mkdir()
        (folder / ".cache" / "x").write_text("x")
        assert data_digest(folder) == first
        path = next(folder.rglob("*.parquet"))
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        assert data_digest(folder) != first
        path.write_bytes(content)
        assert data_digest(folder) == first
        path.rename(path.with_name("other.parquet"))
        assert data_digest(folder) != first


def test_messages_become_turns_with_pictures_at_their_places() -> None:
    grey = Image.new("RGB", (2, 2))
    shots = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {"role": "user", "content": [{"type": "image", "url": grey}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": [{"type": "image", "url": grey}, {"type": "text", "text": "Two?"}]},
    ]
    assert conversation_of(shots) == Conversation(
        (
            Turn("system", "Be short."),
            Turn("human", "<image>\nOne?"),
            Turn("gpt", "Yes"),
            Turn("human", "<image>\nTwo?"),
        ),
        (picture_file(grey),) * 2,
    )
    front = [
        {
            "role": "user",
            "content": [{"type": "image", "url": grey}] * 2 + [{"type": "text", "text": "Which?"}],
        }
    ]
    assert conversation_of(front) == Conversation((Turn("human", "Which?"),), (picture_file(grey),) * 2)
    between = [
        {"role": "user", "content": [{"type": "text", "text": "This: "}, {"type": "image", "url": grey}]}
    ]
    assert conversation_of(between).turns == (Turn("human", "This: <image>\n"),)
    with pytest.raises(SkipRow, match="not_a_picture: the task shows a video"):
        conversation_of([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])
