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
class Noted:
    """A value, with a comment for its line and lines of comment before it."""

    value: Any
    note: str = ""
    before: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Folded:
    """One line of text that is written as several."""

    lines: list[str]


def emit(data: Mapping[str, Any], heading: str) -> str:
    """`data` as YAML under the comment `heading`, a blank line before each section."""
    lines = [f"# {line}" for line in heading.splitlines()]
    nested = False
    for key, value in data.items():
        block = list(_entry(key, value, ""))
        if len(block) > 1 or nested:
            lines.append("")
        nested = len(block) > 1
        lines += block
    return "\n".join(lines) + "\n"


def plain(value: Any) -> Any:
    """The same data without comments, as it is read back."""
    if isinstance(value, Noted):
        return plain(value.value)
    if isinstance(value, Folded):
        return " ".join(value.lines)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def _entry(key: str, value: Any, indent: str) -> Iterator[str]:
    yield from _item(f"{indent}{_scalar(key)}:", value, indent)


def _item(opening: str, value: Any, indent: str) -> Iterator[str]:
    note = ""
    if isinstance(value, Noted):
        yield from (f"{indent}# {line}" for line in value.before)
        value, note = value.value, value.note
    if isinstance(value, Folded):
        yield f"{opening} >-"
        yield from (f"{indent}  {line}" for line in value.lines)
    elif isinstance(value, Mapping) and value and opening.endswith("-"):
        (first, *_), inner = value, f"{indent}  "
        for key, part in value.items():
            start = f"{opening} {_scalar(key)}:" if key == first else f"{inner}{_scalar(key)}:"
            yield from _item(start, part, inner)
    elif isinstance(value, Mapping) and value:
        yield _noted(opening, note)
        for key, part in value.items():
            yield from _entry(key, part, f"{indent}  ")
    elif isinstance(value, list) and value and not _short(value):
        yield _noted(opening, note)
        for part in value:
            yield from _item(f"{indent}  -", part, f"{indent}  ")
    else:
        yield _noted(f"{opening} {_scalar(value)}", note)


def _noted(line: str, note: str) -> str:
    return f"{line:<{_COMMENT_COLUMN - 1}} # {note}" if note else line


def _short(values: list[Any]) -> bool:
    return all(isinstance(value, (int, str)) for value in values) and len(str(values)) < 60


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(inner) for inner in value) + "]"
    if isinstance(value, str) and _PLAIN.match(value) and not _WORDS.match(value):
        return value
    return json.dumps(value)
