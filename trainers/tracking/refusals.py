"""What MLflow refuses for good: divided until as little as possible is left out, and told."""

import logging
from collections import Counter
from typing import Any

logger = logging.getLogger(__name__)

MAX_TOLD = 3
"""Refusals that are named in the line for the terminal."""
MAX_TAG = 4000
"""Characters of the tag with a refusal."""


def parts_of(operation: dict[str, Any]) -> list[dict[str, Any]]:
    """An operation as smaller ones that come to the same; empty where it cannot be divided."""
    do = operation["do"]
    if do == "log":
        return _parts_of_points(operation)
    if do in ("start", "tag"):
        sections = [section for section in ("params", "tags") if section in operation]
        entries = [
            (section, *entry) for section in sections for entry in operation[section].items()
        ]
        if len(entries) < 2:
            return []
        middle = len(entries) // 2
        return [
            {
                **operation,
                **{name: {k: v for of, k, v in half if of == name} for name in sections},
            }
            for half in (entries[:middle], entries[middle:])
        ]
    if operation.get("tags"):  # the status is more than its tags
        tag = {"do": "tag", "run": operation["run"], "tags": operation["tags"]}
        return [tag, {**operation, "tags": {}}]
    return []


def _parts_of_points(operation: dict[str, Any]) -> list[dict[str, Any]]:
    """The points by metric; those of one metric by halves."""
    points = operation["rows"]
    names = dict.fromkeys(point.name for point in points)
    if len(names) > 1:
        groups = [[point for point in points if point.name == name] for name in names]
    elif len(points) > 1:
        middle = len(points) // 2
        groups = [points[:middle], points[middle:]]
    else:
        return []
    return [{**operation, "rows": group} for group in groups]


class Refusals:
    """What was left out, of all runs."""

    def __init__(self) -> None:
        self._count: Counter[tuple[str, str]] = Counter()
        """What was refused and why -> how often; the oldest first."""

    def add(self, operation: dict[str, Any], error: Exception) -> dict[str, Any]:
        """Note that an operation is left out; returns the operation that tags its run with it."""
        names = _names(operation)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("MLflow refuses %s %s; left out: %s", operation["do"], names, reason)
        if len(self._count) < 100 or (names, reason) in self._count:
            self._count[names or operation["do"], reason] += 1
        run = operation.get("run", operation.get("key"))
        tags = {f"heliostat.refused.{operation['do']}": f"{names}: {reason}"[:MAX_TAG]}
        return {"do": "tag", "run": run, "tags": tags}

    def line(self) -> str | None:
        """One line on everything that was left out; None if nothing was."""
        if not self._count:
            return None
        told = [
            f"{names}{f' ({count} times)' if count > 1 else ''}: {reason[:200]}"
            for (names, reason), count in list(self._count.items())[:MAX_TOLD]
        ]
        more = len(self._count) - len(told)
        rest = f"; and {more} more" if more > 0 else ""
        return f"MLflow refused, and is without {'; '.join(told)}{rest}"


def _names(operation: dict[str, Any]) -> str:
    """What an operation would have brought to MLflow."""
    if "rows" in operation:
        return " ".join(sorted({point.name for point in operation["rows"]}))
    named = [*operation.get("params", ()), *operation.get("tags", ())]
    for path in ("path", "folder", "file"):
        if path in operation:
            named.append(operation[path].rpartition("/")[2])
    return " ".join(named)
