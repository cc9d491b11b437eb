"""Toy versions of the datasets that the tasks of this project read, in the hub's layout: a function for each folder.

Each takes the data root and writes a folder `OWNER/NAME` there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.data.clips import write_clip
from tests.evaluation.hub_folder import picture, write_split

OWNER = "lmms-lab-encoder"
TEN = 10


def people(said: str, count: int, others: str = "another") -> list[str]:
    """Ten people's answers: `count` of them `said`, the rest one of `others`, each another."""
    return [said] * count + [f"{others} {number}" for number in range(TEN - count)]


def pope(root: Path) -> Path:
    """Two questions of each category, the first to be answered yes."""
    rows = [
        {
            "id": str(2 * number + no),
            "question_id": str(no),
            "question": f"Is there a {thing} in the image?",
            "answer": "no" if no else "yes",
            "image_source": f"COCO_{number}",
            "image": picture(20 * number),
            "category": category,
        }
        for number, (category, things) in enumerate(
            (("random", ("cat", "dog")), ("popular", ("cup", "hat")), ("adversarial", ("bus", "car")))
        )
        for no, thing in enumerate(things)
    ]
    return write_split(root / OWNER / "POPE", "test", rows)


def mme(root: Path) -> Path:
    """Two pictures of existence, one of code_reasoning; the second question of each is to be answered no."""
    rows = [
        {
            "question_id": name,
            "image": picture(30),
            "question": f"Is {asked} shown in {name}? Please answer yes or no.",
            "answer": answer,
            "category": name.split("/")[0],
        }
        for name in ("existence/1.jpg", "existence/2.jpg", "code_reasoning/0020.png")
        for asked, answer in (("this", "Yes"), ("that", "No"))
    ]
    return write_split(root / OWNER / "MME", "test", rows)


def textvqa(root: Path) -> Path:
    """Two questions, one with words read in the picture."""
    rows = [
        {"question_id": 34602, "question": "what does the Sign say?", "answers": people("stop", 4),
         "ocr_tokens": ["STOP", "4-way"], "image": picture(1)},
        {"question_id": 34603, "question": "what is the brand?", "answers": people("nokia", 2),
         "ocr_tokens": [], "image": picture(2)},
    ]  # fmt: skip
    return write_split(root / OWNER / "textvqa", "validation", rows)


def vqav2(root: Path) -> Path:
    """Three questions with people's answers, and two for the server, the second of them in test-dev."""
    said = [
        ("How many cats?", people("2", 3)),
        ("What animal?", people("dog", 9)),
        ("Which?", people("a", 5)),
    ]
    rows = [
        {
            "question_id": 100 + number,
            "question": question,
            "answers": [
                {"answer": one, "answer_id": place, "answer_confidence": "yes"}
                for place, one in enumerate(answers)
            ],
            "image": picture(number),
        }
        for number, (question, answers) in enumerate(said)
    ]
    write_split(root / OWNER / "VQAv2", "validation", rows)
    test = [
        {"question_id": 200 + number, "question": f"What is it {number}?", "image": picture(number),
         "answers": [{"answer": "", "answer_id": 0, "answer_confidence": ""}]}
        for number in range(2)
    ]  # fmt: skip
    write_split(root / OWNER / "VQAv2", "testdev", test[1:])
    return write_split(root / OWNER / "VQAv2", "test", test)


def vizwiz(root: Path) -> Path:
    """Two questions with people's answers, and two for the server."""
    rows = [
        {"question_id": "VizWiz_val_00000000.jpg", "question": "Ok. What is this?",
         "answers": people("unanswerable", 7), "image": picture(3)},
        {"question_id": "VizWiz_val_00000001.jpg", "question": "Which colour?", "answers": people("red", 1),
         "image": picture(4)},
    ]  # fmt: skip
    write_split(root / OWNER / "VizWiz-VQA", "val", rows)
    test = [
        {"question_id": f"VizWiz_test_0000000{number}.jpg", "question": "What is it?", "answers": [""],
         "image": picture(5)}
        for number in range(2)
    ]  # fmt: skip
    return write_split(root / OWNER / "VizWiz-VQA", "test", test)


def gqa(root: Path) -> Path:
    """Three questions about two pictures, which stand in the other order in a config of their own."""
    folder = root / OWNER / "GQA"
    rows = [
        {"id": "q1", "imageId": "n1", "question": "Is it a dog?", "answer": "yes"},
        {"id": "q2", "imageId": "n2", "question": "What is it?", "answer": "dog"},
        {"id": "q3", "imageId": "n1", "question": "Which animal?", "answer": "dog"},
    ]
    shown = [{"id": "n2", "image": picture(200)}, {"id": "n1", "image": picture(100)}]
    write_split(folder, "testdev", rows, "testdev_balanced_instructions")
    return write_split(folder, "testdev", shown, "testdev_balanced_images")


def science_qa(root: Path) -> Path:
    """Three questions with pictures; the whole has one more without."""
    folder = root / OWNER / "ScienceQA"
    with_picture = [
        {"image": picture(6), "question": "Which state is farthest north?", "choices": ["Ohio", "Maine"],
         "answer": 1, "hint": ""},
        {"image": picture(7), "question": "Which is a mammal?", "choices": ["a cat", "a bee", "a carp"],
         "answer": 0, "hint": "Look at the picture."},
        {"image": picture(8), "question": "Is it solid?", "choices": ["yes", "no"], "answer": 0, "hint": ""},
    ]  # fmt: skip
    text = {
        "image": None,
        "question": "Which word rhymes?",
        "choices": ["hat", "dog"],
        "answer": 0,
        "hint": "",
    }
    write_split(folder, "test", with_picture, "ScienceQA-IMG")
    return write_split(folder, "test", [with_picture[0], text, *with_picture[1:]], "ScienceQA-FULL")


def mmbench(root: Path) -> Path:
    """A question with four options and one with two, each rotation a row, in both languages."""
    folder = root / OWNER / "MMBench"
    for config in ("cn", "en"):
        rows = [
            _mmbench_row(
                1, turn, "What is it?", ["cat", "dog", "cup", "hat"], "BADC"[turn], "object_localization"
            )
            for turn in range(4)
        ]
        # Rotated by one place each time: the dog is B, A, D, C.
        for turn, row in enumerate(rows):
            names = ["cat", "dog", "cup", "hat"]
            row |= dict(zip("ABCD", names[turn:] + names[:turn], strict=True))
        rows += [
            _mmbench_row(
                2, turn, "Is it red?", ["yes", "no"][:: -1 if turn else 1], "AB"[turn], "image_style"
            )
            for turn in range(2)
        ]
        path = write_split(folder, "dev", rows, config)
    return path


def _mmbench_row(
    index: int, turn: int, question: str, options: Sequence[str], answer: str, category: str
) -> dict[str, Any]:
    texts = [*options, "nan", "nan"][:4]
    return {
        "index": index + 1_000_000 * turn, "question": question, "hint": "Look." if index == 1 else "nan",
        **dict(zip("ABCD", texts, strict=True)), "answer": answer, "category": category, "L2-category": "x",
        "source": "toy", "split": "dev", "image": picture(9),
    }  # fmt: skip


def seed(root: Path) -> Path:
    """Two questions about pictures and one about a video."""
    rows = [
        {"question_id": f"{number}", "question": f"What is in {kind} {number}?", "choice_a": "One", "choice_b": "Two",
         "choice_c": "Three", "choice_d": "Four", "answer": "A", "data_type": kind,
         "image": [picture(10 + number)]}
        for number, kind in enumerate(("image", "video", "image"))
    ]  # fmt: skip
    return write_split(root / OWNER / "SEED-Bench", "test", rows)


def mmvet(root: Path) -> Path:
    """Two questions."""
    rows = [
        {"question_id": f"v1_{number}", "question": f"What is x in equation {number}?", "answer": "-1<AND>-5",
         "capability": ("ocr,math", "math")[number], "image": picture(11)}
        for number in range(2)
    ]  # fmt: skip
    return write_split(root / OWNER / "MMVet", "test", rows)


def okvqa(root: Path) -> Path:
    """Two questions, and five of the split of training questions, which a user adds."""
    folder = root / OWNER / "OK-VQA"
    rows = [
        {"question_id": number, "question": f"What sport is {number}?", "answers": people("golf", 4 - number),
         "image": picture(50 + number)}
        for number in range(2)
    ]  # fmt: skip
    train = [
        {"question_id": 10 + number, "question": f"What is made of {number}?", "answers": people(f"wood {number}", 5),
         "image": picture(60 + number)}
        for number in range(5)
    ]  # fmt: skip
    write_split(folder, "val2014", rows)
    return write_split(folder, "train2014", train)


def videos(root: Path) -> Path:
    """Three questions about two clips, of 16 and of 5 frames; those of MSRVTT-QA lie in a folder of their own."""
    for name, ending, place in (("MSVD", "avi", "videos"), ("MSRVTT", "mp4", "videos/all")):
        folder = root / "GPT_Zero_Shot_QA" / f"{name}_Zero_Shot_QA"
        (folder / place).mkdir(parents=True, exist_ok=True)
        for clip, frames in (("long", 16), ("short", 5)):
            write_clip(folder / place / f"{clip}.{ending}", frames)
        rows = [
            {
                "question_id": number,
                "question": f"what is a man {doing}?",
                "answer": answer,
                "video_name": clip,
            }
            for number, (doing, answer, clip) in enumerate(
                (("playing", "guitar", "long"), ("cutting", "onion", "short"), ("riding", "horse", "long"))
            )
        ]
        rows[1]["video_name"] = f"short.{ending}"
        path = write_split(folder, "test", rows)
    return path


CAPTIONS = (
    ("A cat sits on a mat.", "a cat on the mat"),
    ("A red cup of coffee.", "coffee in a red cup"),
    ("Two dogs run.", "two dogs running"),
)


def karpathy(root: Path) -> Path:
    """Three pictures of the test split and five of the training split, and COCO's folders with them."""
    folder = root / "yerevann" / "coco-karpathy"

    def row(part: str, number: int, sentences: Sequence[str]) -> dict[str, Any]:
        name = f"COCO_{part}_{number:012}.jpg"
        place = root / "coco" / part / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(number)["bytes"])
        return {"filename": name, "imgid": number, "sentences": list(sentences), "url": "http://x"}

    write_split(folder, "test", [row("val2014", 70 + n, texts) for n, texts in enumerate(CAPTIONS)])
    return write_split(
        folder, "train", [row("train2014", 80 + n, [f"picture {n}", "other"]) for n in range(5)]
    )


FOLDERS: tuple[Callable[[Path], Path], ...] = (
    pope, mme, textvqa, vqav2, vizwiz, gqa, science_qa, mmbench, seed, mmvet, okvqa, karpathy, videos,
)  # fmt: skip
"""All of them."""


def write_all(root: Path) -> None:
    """Write every folder."""
    for write in FOLDERS:
        write(root)
