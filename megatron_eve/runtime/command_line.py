"""How every command reads its flags, prints `--help`, and says what is wrong with what was typed.

`CommandParser` is argparse with one look for all pages: usage, examples, what the command does, flags in groups with
their defaults. A mistake is one `error:` line with the remedy (`show_error`), not the usage as well.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from megatron_eve.runtime.errors import UserError, show_error

# Columns: a page is no wider than this on a wide terminal, since longer lines are hard to read.
_WIDEST = 120
# Stands for a space at which a line is not to be broken.
_KEPT = "\0"
# Pages from this width on have most flags beside their texts; narrower ones put the text of a long flag below it.
_WIDE, _TEXT_AT_WIDE, _TEXT_AT = 110, 44, 28


class CommandParser(argparse.ArgumentParser):
    """Flags of a command.

    Args:
        description: what the command does. A blank line ends a paragraph; indented lines are a table, whose second
            column, two spaces or more behind the first, is wrapped in itself.
        examples: command lines, one a line or continued with a backslash; they stand above everything else.
        others: what flags of other programs are called here, for `--x: no such flag; ...`.
        settings: of argparse.
    """

    def __init__(
        self,
        *,
        description: str = "",
        examples: str = "",
        others: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        settings.setdefault("formatter_class", HelpPage)
        super().__init__(description=description, allow_abbrev=False, **settings)
        self.examples, self.others = examples, others or {}

    def format_usage(self) -> str:
        """The usage: what is required, and `[options]` for all else."""
        page = self._get_formatter()
        self._add_usage(page)
        return page.format_help()

    def format_help(self) -> str:
        """The page that `--help` prints, as wide as the terminal (COLUMNS) and at most 120 columns."""
        page = self._get_formatter()
        self._add_usage(page)
        if lines := textwrap.dedent(self.examples).strip("\n"):
            more = len([line for line in lines.replace("\\\n", "").splitlines() if line.strip()]) > 1
            page.add_text(f"example{'s' if more else ''}:\n" + textwrap.indent(lines, "  "))
        page.add_text(self.description)
        for group in self._groups():
            page.start_section(group.title)
            page.add_text(group.description)
            page.add_arguments(
                sorted(group._group_actions, key=lambda action: "--help" in action.option_strings)
            )
            page.end_section()
        page.add_text(self.epilog)
        return page.format_help()

    def _groups(self) -> list[argparse._ArgumentGroup]:
        """The groups as the page has them: that of --help and of flags without another group comes last."""
        self._positionals.title = "arguments"
        self._optionals.title = "options" if len(self._optionals._group_actions) > 1 else "other"
        return [group for group in self._action_groups if group is not self._optionals] + [self._optionals]

    def _add_usage(self, page: argparse.HelpFormatter) -> None:
        if self.usage:
            page.add_usage(self.usage, [], [])
            return
        shown = [action for action in self._actions if action.required or not action.option_strings]
        if any(action not in shown and "--help" not in action.option_strings for action in self._actions):
            shown.append(argparse.Action([], "options", metavar="[options]"))
        page.add_usage(None, shown, [])

    def known_flags(self) -> set[str]:
        """Every flag of this command, with dashes in front."""
        return {flag for action in self._actions for flag in action.option_strings}

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Read the words of the command line; a word that is no flag of this command ends the process with status 2."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown_flags(words)
        found, rest = self.parse_known_args(list(map(_dashed, words)), namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found

    def _refuse_unknown_flags(self, words: Sequence[str]) -> None:
        """Before anything else is said: a misspelt flag is often the one that seems to be missing."""
        known = self.known_flags()
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = [action.choices[name] for name in words if name in action.choices]
                if not chosen:
                    return
                known |= chosen[0].known_flags()
        flags = [word.split("=", 1)[0] for word in words if word.startswith("--") and len(word) > 2]
        unknown = [flag for flag in flags if _dashed(flag) not in known]
        if unknown and not {"-h", "--help"} & set(words):
            # A flag that the page does not show is of no use here.
            known -= {
                flag
                for action in self._actions
                if action.help == argparse.SUPPRESS
                for flag in action.option_strings
            }
            self.error(
                "\n".join(f"{flag}: no such flag; {flag_hint(flag, known, self.others)}" for flag in unknown)
            )

    def error(self, message: str) -> NoReturn:
        """Print a mistake as one `error:` line, and exit with status 2."""
        sys.exit(show_error(UserError(reworded(message))))


def _dashed(word: str) -> str:
    """A flag may be written with underscores, as Hugging Face's trainer has them."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def command_parser_of(doc: str | None, **settings: Any) -> CommandParser:
    """A parser whose page is the docstring of a script, with its indented command lines as the examples.

    Args:
        doc: `__doc__`; lines such as `    python benchmarks/packing.py --steps 20` are examples.
        settings: of `CommandParser`.
    """
    paragraphs = textwrap.dedent(doc or "").strip().split("\n\n")
    command = re.compile(r"\s+(?:\w+=\S+ )*(?:python|torchrun|make|bash) ")
    examples = [part for part in paragraphs if command.match(part)]
    text = [part for part in paragraphs if part not in examples]
    return CommandParser(
        description="\n\n".join(text), examples="\n".join(map(textwrap.dedent, examples)), **settings
    )


def whole_number(least: int) -> Callable[[str], int]:
    """The `type` of a flag that takes whole numbers from `least` on."""

    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word}: must be a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{word}: must be {least} or more")
        return value

    return read


class HelpPage(argparse.HelpFormatter):
    """The look of a help page: wrapped text that breaks no flag in two, and each default once."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        super().__init__(prog, width=width, max_help_position=_TEXT_AT_WIDE if width >= _WIDE else _TEXT_AT)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        if usage:
            return "\n".join(_wrap(f"usage: {usage}", self._width, "", " " * 4)) + "\n\n"
        words = [f"usage: {self._prog}"]
        for action in actions:
            metavar = self._get_default_metavar_for_positional(action)
            if action.option_strings:
                metavar = self._get_default_metavar_for_optional(action)
            words.append(" ".join([*action.option_strings[-1:], self._format_args(action, metavar)]))
        # A flag and its value stay on one line.
        lines = _wrap(" ".join(word.replace(" ", _KEPT) for word in words), self._width, "", " " * 4)
        return "\n".join(lines).replace(_KEPT, " ") + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = textwrap.dedent(text).strip("\n").split("\n\n")
        return "\n\n".join("\n".join(_filled(block.splitlines(), width, indent)) for block in blocks)

    def _split_lines(self, text: str, width: int) -> list[str]:
        kept = " ".join(text.split()).replace("(default: ", f"(default:{_KEPT}")
        return [line.replace(_KEPT, " ") for line in _wrap(kept, width)]

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (int, float):
            return "N" if action.type is int else "X"
        return super()._get_default_metavar_for_optional(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        pair = isinstance(action, argparse.BooleanOptionalAction)
        flags = (" / " if pair else ", ").join(action.option_strings)
        if action.nargs == 0:
            return flags
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        if action.choices and action.nargs in ("+", "*"):  # not the choices twice
            values = f"{self._metavar_formatter(action, '')(1)[0]} ..."
        return f"{flags} {values}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.nargs == 0 or "(default" in text:
            return text
        if action.required:
            return f"{text} (required)"
        default = action.default
        if default in (None, argparse.SUPPRESS) or default == [] or default == ():
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


# A row of a table: a first column, and a second one that two spaces or more set off.
_ROW = re.compile(r"(\s+\S+(?: \S+)*?\s{2,})(\S.*)")


def _filled(lines: Sequence[str], width: int, indent: str) -> Iterator[str]:
    """A paragraph: plain lines are wrapped together, rows of a table each, and command lines stay as they are."""
    rows: list[tuple[str, str]] = []  # what stands in front of a row's first line, and its text
    commands = False
    for line in lines:
        plain = not line.startswith(" ")
        row = _ROW.fullmatch(line)
        if commands or lines[0] in ("example:", "examples:"):
            commands = True
            rows.append((line, ""))
        elif rows and len(rows[-1][0]) == _indent(line) and (plain or _indent(line) > 2):
            rows[-1] = rows[-1][0], f"{rows[-1][1]} {line.strip()}"
        elif row:
            rows.append((row[1], row[2]))
        else:
            rows.append((line[: _indent(line)], line.strip()))
    for front, text in rows:
        if not text:
            yield indent + front
        else:
            yield from _wrap(text, width, indent + front, indent + " " * len(front))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _wrap(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_on_hyphens=False,
        break_long_words=False,
    )


# What argparse says, in words that need no Python. `--x: 0: must be 1 or more` comes of a type that names the value.
_REWORDED = (
    (r"argument \{.*\}: invalid choice: '?(.*?)'? \(choose from (.*)\)", r"\1: no such command; choose one of \2"),
    (r"argument ([^\s/:]+)[^\s:]*: invalid choice: '?(.*?)'? \(choose from (.*)\)", r"\1 \2: must be one of \3"),
    (r"argument ([^\s/:]+)[^\s:]*: invalid int value: '(.*)'", r"\1 \2: must be a whole number"),
    (r"argument ([^\s/:]+)[^\s:]*: invalid float value: '(.*)'", r"\1 \2: must be a number"),
    (r"argument ([^\s/:]+)[^\s:]*: expected .* arguments?", r"\1: a value is missing behind it"),
    (r"argument ([^\s/:]+)[^\s:]*: ignored explicit argument '(.*)'", r"\1 \2: this flag takes no value"),
    (r"argument ([^\s/:]+)[^\s:]*: not allowed with argument (\S+)", r"\1: cannot be given together with \2"),
    (r"argument ([^\s/:]+)[^\s:]*: (.*)", r"\1 \2"),
    (r"unrecognized arguments: (.*)", r"\1: no flag, nor a value of the flag before it; --help lists the flags"),
    (r"the following arguments are required: (.*)", r"required: \1; see --help"),
)  # fmt: skip


def reworded(message: str) -> str:
    """What argparse says of a mistake, as a sentence that begins with the flag and its value."""
    for pattern, words in _REWORDED:
        if re.fullmatch(pattern, message, re.DOTALL):
            said = re.sub(pattern, words, message, flags=re.DOTALL)
            return said.replace("'", "") if "invalid choice" in message else said
    return message


def flag_hint(flag: str, known: Iterable[str], others: Mapping[str, str]) -> str:
    """What to do about a flag that does not exist.

    Args:
        flag: as it was written, without a value.
        known: all flags that exist.
        others: what flags of other programs are called here.

    Returns:
        A clause that follows "no such flag; ".
    """
    plain = flag.lower().replace("_", "-")
    other = others.get(plain)
    if other is None and plain.startswith("--no-"):
        other = others.get(f"--{plain[5:]}")
    return other or nearest(plain, known) or "--help lists them all"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """A clause that names the nearest of the known words, or None where none is near."""
    words = sorted(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    # Part of a name, such as --tensor-parallel, is farther from it than its spelling suggests.
    parts = set(word.strip("-").replace("_", "-").split("-"))
    whole = [name for name in words if parts <= set(name.strip("-").replace("_", "-").split("-"))]
    found = near or whole[:1] or difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {found[0]}?" if found else None
