"""The Dockerfile's part in Python: what an image keeps, what is installed into it, and images that will not do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.image_requirements import check_transformer_engine, plan

ROOT = Path(__file__).resolve().parents[1]
IMAGE = {
    "torch": "2.10.0a0+a36e1d39eb.nv26.1", "transformer-engine": "2.11.0+c188b533", "numpy": "2.1.0",
    "nvidia-dali-cuda130": "1.53.0", "pillow": "11.3.0", "torchmetrics": "1.8.0",
}  # fmt: skip


def test_the_image_keeps_what_was_built_together() -> None:
    lines = plan(IMAGE)
    assert lines["kept"] == [
        "nvidia-dali-cuda130==1.53.0",
        "torch==2.10.0a0+a36e1d39eb.nv26.1",
        "transformer-engine==2.11.0+c188b533",
    ]
    names = {re.split(r"[=<>]", line)[0] for line in lines["requirements"]}
    assert "torch" not in names and "transformers" in names and "megatron-core" in names
    assert not [line for line in lines["requirements"] if "dali" in line]
    pinned = {line.split("==")[0] for line in lines["tested"]}
    assert "transformers" in pinned
    assert not pinned & {"torch", "transformer-engine", "numpy", "pillow"}


def test_an_image_without_dali_gets_one() -> None:
    lines = plan({name: version for name, version in IMAGE.items() if "dali" not in name})
    assert lines["requirements"][-1].startswith("nvidia-dali-cuda130==")


@pytest.mark.parametrize("version", ["2.9.0", "2.10.0+abc", "2.11.0+c188b533"])
def test_versions_of_transformer_engine_that_megatron_core_takes(version: str) -> None:
    check_transformer_engine({"transformer-engine": version})


@pytest.mark.parametrize("version", ["1.14.0", "2.8.0+abc", "2.12.0", "3.0", None])
def test_other_versions_stop_the_build(version: str | None) -> None:
    with pytest.raises(SystemExit) as caught:
        check_transformer_engine({"transformer-engine": version} if version else {})
    assert "--build-arg BASE=" in str(caught.value.code)


def test_what_the_dockerfile_copies_is_there_and_is_sent() -> None:
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert f"!{name}\n" in allowed
