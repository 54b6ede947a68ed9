"""What MLflow cannot hold: odd names, long texts, numbers of more than 64 bits."""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable
from typing import Any

from trainers.tracking.operation_log import MetricPoint

MAX_LENGTH = {"parameters": 6000, "tags": 5000}
"""Characters. MLflow cuts longer parameters without a word, and refuses longer tags."""
MAX_NAME_LENGTH = 200
"""Characters; MLflow's own limit is 250."""


class NumberOutOfRangeError(ValueError):
    """A step or timestamp does not fit in the 64 bits that MLflow's requests have for it."""


def check_range(points: Iterable[MetricPoint]) -> None:
    """Raises NumberOutOfRangeError."""
    for point in points:
        for number in (point.step, point.timestamp_ms):
            if not -(2**63) <= number < 2**63:
                raise NumberOutOfRangeError(f"{number} does not fit in 64 bits")


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def excerpt(text: str, file: str) -> str:
    """The beginning of a text that is too long, and where the whole of it is."""
    return f"{text[:200]}... ({len(text)} characters, whole in {file})"


class AllowedNames:
    """Maps names to names that MLflow accepts, one to one among the names of a run and kind.

    The first of several names that would become the same one gets it; to the others a part of
    their hash is appended. So the result depends on the order of the calls, which must be that of
    the operation log.
    """

    def __init__(self) -> None:
        self._allowed: dict[tuple[str, str, str], str] = {}
        self._original: dict[tuple[str, str, str], str] = {}

    def get(self, run: str, kind: str, name: str) -> str:
        known = self._allowed.get((run, kind, name))
        if known is not None:
            return known
        allowed = _allowed(name)
        if self._original.setdefault((run, kind, allowed), name) != name:
            allowed = f"{allowed}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            self._original[run, kind, allowed] = name
        self._allowed[run, kind, name] = allowed
        return allowed


def _allowed(name: str) -> str:
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(allowed).lstrip("./")[:MAX_NAME_LENGTH] or "_"
