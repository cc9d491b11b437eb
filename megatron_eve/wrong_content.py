"""Files that hold something else than their name says, as failed downloads leave them."""

from __future__ import annotations

from pathlib import Path

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HEAD = 512  # bytes that are looked at


def wrong_content(path: Path) -> str | None:
    """What a file is where weights or a tokenizer were expected, and the remedy; None if nothing is known against it.

    Args:
        path: a file; one that cannot be read has nothing known against it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "is empty; copy or download it again"
    if text.startswith(_LFS_POINTER):
        return (
            "is a pointer of git-lfs, not the file itself; run `git lfs install` and `git lfs pull` in the "
            "repository that it was cloned with"
        )
    if text[:15].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page, such as a site shows instead of a file; download it again (are you logged in there?)"
    return None
