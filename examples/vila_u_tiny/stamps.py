"""Photos and drawings with a sentence each, from Debian's package tuxpaint-stamps-default (GPL-2).

`apt-get install tuxpaint-stamps-default` puts them into /usr/share/tuxpaint/stamps; unpacking the package
(`dpkg-deb -x`) needs no rights. Each PNG has a text file, whose first line is an English sentence. Letters and signs
(`symbols`, but for money), mirror images and what is white alone are left out.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from vila_u_tiny.pairs import Pair, square

from megatron_eve.config.errors import ConfigError

FOLDER = Path("/usr/share/tuxpaint/stamps")
HELD_OUT = 120
"""Pairs that nothing trains on."""
# Folders that say how a stamp was made, and not what it shows.
_SILENT = {"cartoon", "00_symbols", "symbols"}
_WORDS = {"us": "United States", "uk": "United Kingdom", "arttools": "art tools", "newyears": "new year"}
_WORDS |= {"roadsigns": "road signs", "masstransit": "mass transit", "naturalforces": "natural forces"}


@dataclass(frozen=True)
class Stamps:
    """Pairs to train on, and pairs that are held out; no picture or name is in both.

    Attributes:
        trained, held_out: the pairs.
    """

    trained: Sequence[Pair]
    held_out: Sequence[Pair]


def read_stamps(folder: Path) -> Stamps:
    """The stamps of a folder, split by a hash of their names.

    Raises:
        ConfigError: there are fewer than twice those to be held out.
    """
    pairs = list(_pairs(folder))
    if len(pairs) < 2 * HELD_OUT:
        raise ConfigError(
            f"--stamps {folder}: {len(pairs)} pictures with a sentence, and {2 * HELD_OUT} or more are needed; run "
            "apt-get install tuxpaint-stamps-default, or name usr/share/tuxpaint/stamps of the unpacked package"
        )
    held = held_out_names(pairs)
    return Stamps(
        [pair for pair in pairs if pair.name not in held], [pair for pair in pairs if pair.name in held]
    )


def held_out_names(pairs: Sequence[Pair], count: int = HELD_OUT) -> set[str]:
    """Names of `count` pairs: whole groups of alike ones, in the order of a hash of their names.

    Alike are pairs with the same picture, and names that differ in their folder, or in a number at their end.
    """
    groups = _groups(pairs)
    held: set[str] = set()
    for group in sorted(groups, key=lambda names: hashlib.sha256(min(names).encode()).hexdigest()):
        if len(held) + len(group) <= count:
            held |= group
    return held


def sentence_of(line: str, folders: Sequence[str]) -> str:
    """A stamp's sentence, and the words of its folders: "A parrot. Animals, birds."."""
    words = [_WORDS.get(name, name.replace("_", " ")) for name in folders if name not in _SILENT]
    line = line.strip().removeprefix("– ")
    line += "" if line.endswith((".", "!", "?", "…", ")")) else "."
    shelf = ", ".join(words)
    return f"{line} {shelf[0].upper()}{shelf[1:]}." if words else line


def _pairs(folder: Path) -> Iterator[Pair]:
    for path in sorted(folder.rglob("*.png")):
        place, text = path.relative_to(folder), path.with_suffix(".txt")
        if "_mirror" in path.stem or not text.is_file():
            continue
        if place.parts[0] == "symbols" and "money" not in place.parts:
            continue
        line = text.read_text(encoding="utf-8").partition("\n")[0]
        with Image.open(path) as image:
            pixels = square(image)
        if pixels.min() == pixels.max():
            continue  # white on white
        name = ".".join(one.replace(".", "_").replace(" ", "_") for one in place.with_suffix("").parts)
        yield Pair(name, pixels, sentence_of(line, place.parts[:-1]))


def _groups(pairs: Sequence[Pair]) -> list[set[str]]:
    """Names of pairs, in groups of those that are alike."""
    group_of: dict[str, set[str]] = {}
    alike: dict[bytes | str, list[str]] = defaultdict(list)
    for pair in pairs:
        group_of[pair.name] = {pair.name}
        alike[hashlib.sha256(pair.pixels.tobytes()).digest()].append(pair.name)
        alike[_stem(pair.name)].append(pair.name)
    for first, *others in alike.values():
        for other in others:
            if group_of[other] is not group_of[first]:
                group_of[first] |= group_of[other]
                for name in group_of[other]:
                    group_of[name] = group_of[first]
    return list({id(group): group for group in group_of.values()}.values())


def _stem(name: str) -> str:
    """The end of a name, without numbers, sides and single letters behind it; a number alone is kept."""
    last = name.rsplit(".", 1)[-1].lower()
    return re.sub(r"([-_]?(back|front|left|right|\d+[ab]?|(?<=[-_])[a-z]))+$", "", last) or last
