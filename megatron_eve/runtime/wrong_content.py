"""Detects files with the wrong content, as failed downloads leave them: a web page, a git-lfs pointer, nothing."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.runtime.errors import is_lfs_pointer

_HEAD = 512  # bytes that are examined


def wrong_content(path: Path) -> str | None:
    """What is wrong with a file that should hold weights or a tokenizer, and the remedy; None if nothing is found.

    Args:
        path: a file; None is returned if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "is empty; copy or download it again"
    if is_lfs_pointer(head):
        return "is a git-lfs pointer, not the file itself: run git lfs pull in its folder"
    if text[:15].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is a web page, such as a site shows instead of a file; download it again (are you logged in there?)"
    return None
