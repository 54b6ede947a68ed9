"""YAML with comments for people: comments at line ends, and shell commands on several lines.

Written by ruamel.yaml. Ray reads the files with YAML 1.1, and `read_yaml` with 1.2, so every string
that either could read as something else is quoted.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import (
    DoubleQuotedScalarString,
    FoldedScalarString,
    LiteralScalarString,
)

_UNQUOTED = re.compile(r"[A-Za-z~/][\w./~*+-]*( [\w./~*+-]+)*$")
_RESERVED = re.compile(r"(y|n|yes|no|on|off|true|false|null|~)$", re.IGNORECASE)
"""Words that YAML 1.1 or 1.2 reads as a boolean or null."""
_COMMENT_COLUMN = 40
_FLOW_WIDTH = 60
"""A mapping or list that is shorter is written on one line."""


@dataclass(frozen=True)
class Commented:
    """A value with a comment at the end of its line."""

    value: Any
    comment: str = ""


@dataclass(frozen=True)
class ShellCommand:
    """A command written on several lines: folded, so that YAML joins them with spaces, or literal,
    so that the line breaks stay.
    """

    lines: list[str]
    literal: bool = False

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n" if self.literal else " ".join(self.lines)


def dump_commented(data: Mapping[str, Any], heading: str = "") -> str:
    """`data` as YAML below the comment `heading`. Blank lines separate the sections."""
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 100_000  # shell commands are broken where `ShellCommand` says, and only there
    yaml.brace_single_entry_mapping_in_flow_sequence = True  # JSON's form, as Ray's examples have
    text = "".join(f"# {line}".rstrip() + "\n" for line in heading.splitlines())
    after_block = False
    for key, value in data.items():
        stream = io.StringIO()
        yaml.dump(_node({key: value}, flow=False), stream)
        section = stream.getvalue()
        is_block = section.count("\n") > 1
        text += "\n" * (is_block or after_block) + section
        after_block = is_block
    return text


def plain_data(value: Any) -> Any:
    """The same data without comments, as a reader of the YAML gets it."""
    if isinstance(value, Commented):
        return plain_data(value.value)
    if isinstance(value, ShellCommand):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain_data(inner) for key, inner in value.items()}
    return [plain_data(inner) for inner in value] if isinstance(value, list) else value


def _node(value: Any, flow: bool = True) -> Any:
    """ruamel's form of `value`; short mappings and lists on one line where `flow` allows it."""
    if isinstance(value, Commented):
        return _node(value.value)
    if isinstance(value, ShellCommand):
        return _command(value)
    if isinstance(value, Mapping | list):
        return _collection(value, flow)
    if isinstance(value, str):
        return DoubleQuotedScalarString(value) if _is_quoted(value) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _command(command: ShellCommand) -> Any:
    if command.literal:
        return LiteralScalarString(str(command))
    folded = FoldedScalarString(str(command))
    ends = itertools.accumulate(len(line) + 1 for line in command.lines)
    folded.fold_pos = [end - 1 for end in ends][:-1]
    return folded


def _collection(value: Mapping[str, Any] | list[Any], flow: bool) -> CommentedMap | CommentedSeq:
    node: CommentedMap | CommentedSeq
    if isinstance(value, Mapping):
        node, entries = CommentedMap(), [(_node(key), inner) for key, inner in value.items()]
        node.update((key, _node(inner)) for key, inner in entries)
    else:
        node, entries = CommentedSeq(map(_node, value)), list(enumerate(value))
    for key, inner in entries:
        if isinstance(inner, Commented) and inner.comment:
            node.yaml_add_eol_comment(inner.comment, key, column=_COMMENT_COLUMN)
    if flow and _flow_width(value) < _FLOW_WIDTH:
        node.fa.set_flow_style()
    else:
        node.fa.set_block_style()
    return node


def _flow_width(value: Any) -> float:
    """Characters that `value` takes on one line; infinite with comments or commands in it."""
    if isinstance(value, Commented | ShellCommand):
        return math.inf
    if isinstance(value, Mapping):
        pairs = (_flow_width(key) + 2 + _flow_width(inner) for key, inner in value.items())
        return sum(pairs) + 2 * max(1, len(value))
    if isinstance(value, list):
        return sum(map(_flow_width, value)) + 2 * max(1, len(value))
    return len(value) + 2 * _is_quoted(value) if isinstance(value, str) else len(str(value))


def _is_quoted(text: str) -> bool:
    return not _UNQUOTED.match(text) or bool(_RESERVED.match(text))
