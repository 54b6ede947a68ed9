"""YAML for people: comments at the ends of lines, long commands folded, nothing else.

Comments are why this is not a library's dump. What it writes is read back by tests with YAML 1.1,
as Ray reads it, and 1.2.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_PLAIN = re.compile(r"[A-Za-z~/][\w./~*+-]*( [\w./~*+-]+)*$")
_WORDS = re.compile(r"(y|n|yes|no|on|off|true|false|null|~)$", re.IGNORECASE)
_COMMENT_COLUMN = 40


@dataclass(frozen=True)
class Commented:
    """A value, with a comment for its line and lines of comment before it."""

    value: Any
    comment: str = ""
    comment_before: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ShellCommand:
    """Text that is written as several lines: one line in truth, or `kept` as it stands."""

    lines: list[str]
    literal: bool = False

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n" if self.literal else " ".join(self.lines)


def dump_commented(data: Mapping[str, Any], heading: str = "") -> str:
    """`data` as YAML under the comment `heading`, a blank line around each section."""
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    nested = False
    for key, value in data.items():
        block = list(_entry(key, value, ""))
        if len(block) > 1 or nested:
            lines.append("")
        nested = len(block) > 1
        lines += block
    return "\n".join(lines) + "\n"


def plain_data(value: Any) -> Any:
    """The same data without comments, as it is read back."""
    if isinstance(value, Commented):
        return plain_data(value.value)
    if isinstance(value, ShellCommand):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain_data(inner) for key, inner in value.items()}
    return [plain_data(inner) for inner in value] if isinstance(value, list) else value


def _entry(key: str, value: Any, indent: str) -> Iterator[str]:
    yield from _item(f"{indent}{_scalar(key)}:", value, indent)


def _item(opening: str, value: Any, indent: str) -> Iterator[str]:
    note = ""
    if isinstance(value, Commented):
        yield from (f"{indent}# {line}" for line in value.comment_before)
        value, note = value.value, value.comment
    if isinstance(value, ShellCommand):
        yield f"{opening} {'|' if value.literal else '>-'}"
        yield from (f"{indent}  {line}" for line in value.lines)
    elif _short(value):
        yield _noted(f"{opening} {_scalar(value)}", note)
    elif isinstance(value, Mapping) and opening.endswith("-"):
        (first, *_), inner = value, f"{indent}  "
        for key, part in value.items():
            start = f"{opening} {_scalar(key)}:" if key == first else f"{inner}{_scalar(key)}:"
            yield from _item(start, part, inner)
    elif isinstance(value, Mapping):
        yield _noted(opening, note)
        for key, part in value.items():
            yield from _entry(key, part, f"{indent}  ")
    elif isinstance(value, list):
        yield _noted(opening, note)
        for part in value:
            yield from _item(f"{indent}  -", part, f"{indent}  ")
    else:
        yield _noted(f"{opening} {_scalar(value)}", note)


def _noted(line: str, note: str) -> str:
    return f"{line:<{_COMMENT_COLUMN - 1}} # {note}" if note else line


def _short(value: Any) -> bool:
    """Whether it fits within a line, with no comment in it."""
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        plain = all(isinstance(part, int | float | str | list | Mapping) for part in inner)
        return plain and all(map(_short, inner)) and len(_scalar(value)) < 60
    return not isinstance(value, Commented | ShellCommand)


def _scalar(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(key)}: {_scalar(it)}" for key, it in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(inner) for inner in value) + "]"
    if isinstance(value, str) and _PLAIN.match(value) and not _WORDS.match(value):
        return value
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, ensure_ascii=False)
