"""Many operations in one transaction, where MLflow is a database that this process opens itself.

A short trial is five operations, and by MLflow's client each of them takes 10 to 30 ms of the CPU.
Whatever cannot be written in this way, or fails, is sent by the client as ever.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from trainers.tracking.mlflow_internals import RunChange, SqlRuns
from trainers.tracking.mlflow_limits import (
    MAX_LENGTH,
    AllowedNames,
    NumberOutOfRangeError,
    as_text,
    check_range,
)
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.preflight import mask_password

RUN_TAG, KEY_TAG = "heliostat.run", "heliostat.key"
MAX_FAILURES = 3
"""Transactions that failed, one after the other, after which no more are tried."""

logger = logging.getLogger(__name__)


def name_of(key: str) -> str:
    """The name of a run in MLflow. Trials of all sweeps are listed together: SWEEP-0007."""
    return key.replace("/", "-")


@dataclass(frozen=True)
class KnownRuns:
    """What a `MlflowStore` knows of its runs; the fields are those of the store itself."""

    run_ids: dict[str, str]
    new_runs: set[str]
    created_once: set[str]
    names: AllowedNames


class BulkWriter:
    """Writes operations for the runs of a store."""

    def __init__(
        self,
        known: KnownRuns,
        find_id: Callable[[str], str],
        remember: Callable[[str, str], None],
    ) -> None:
        """`find_id` gives MLflow's id of a run, and `remember` is called with that of a new one."""
        self._known, self._find_id, self._remember = known, find_id, remember
        self._sql: SqlRuns | None = None
        self._failures = 0

    def write(self, operations: Sequence[dict[str, Any]], connect: Callable[[], SqlRuns]) -> int:
        """Write the first of the operations, which are of several runs; returns how many.

        Raises what `connect` raises, but for TypeError, which says that there is no database.
        """
        if len(operations) < 2 or self._failures >= MAX_FAILURES:
            return 0
        changes: dict[str, RunChange] = {}
        count = 0
        try:
            self._sql = self._sql or connect()
        except TypeError:  # a server
            self._failures = MAX_FAILURES
            return 0
        try:
            for operation in operations:
                if not self._add(changes, operation):
                    break
                count += 1
            if count < 2:
                return 0
            self._sql.write(list(changes.values()))
        except Exception as error:  # of whatever kind: each is sent by itself then
            self._failures += 1
            logger.info("MLflow's database, %d operations: %s", len(operations), error)
            return 0
        self._failures = 0
        for key, change in changes.items():
            if change.start_ms is not None:
                self._known.new_runs.discard(key)
                self._known.created_once.add(key)
                self._remember(key, change.run_id)
        return count

    def _add(self, changes: dict[str, RunChange], operation: dict[str, Any]) -> bool:
        """Add an operation to what changes of its run; False if it needs more than rows."""
        kind = operation["do"]
        if kind in ("made", "start"):
            return kind == "made" or self._add_start(changes, operation)
        key, tags = operation.get("run", ""), operation.get("tags", {})
        change = changes.get(key)
        if change is None and key in self._known.run_ids:
            change = RunChange(self._known.run_ids[key])
        if change is None or any(len(text) > MAX_LENGTH["tags"] for text in tags.values()):
            return False
        if kind == "log":
            points = operation["rows"]
            if not all(self._is_plain(key, point) for point in points):
                return False
            change.metrics += points
        elif kind == "finish":
            if change.start_ms is None and key not in self._known.created_once:
                return False  # there may be duplicates
            change.status, change.end_ms = operation["status"], operation["at"]
        elif kind != "tag":
            return False
        change.tags |= tags
        changes[key] = change
        return True

    def _add_start(self, changes: dict[str, RunChange], operation: dict[str, Any]) -> bool:
        key, parent = operation["key"], operation["parent"]
        params = {k: mask_password(as_text(value)) for k, value in operation["params"].items()}
        texts = {"parameters": params, "tags": operation["tags"]}
        if key not in self._known.new_runs or any(
            len(text) > MAX_LENGTH[kind] for kind, each in texts.items() for text in each.values()
        ):
            return False
        if any(self._known.names.get(key, "param", name) != name for name in params):
            return False
        name = name_of(key)
        tags = {
            RUN_TAG: operation["id"],
            KEY_TAG: key,
            "mlflow.runName": name,
            **operation["tags"],
        }
        if parent is not None:
            own = changes.get(parent)
            parent_id = own.run_id if own is not None else self._find_id(parent)
            tags["mlflow.parentRunId"] = parent_id
        changes[key] = RunChange(uuid4().hex, name, operation["at"], params, tags)
        return True

    def _is_plain(self, key: str, point: MetricPoint) -> bool:
        """Whether a point is a row as it is, and nothing has to be noted about it."""
        try:
            check_range([point])
        except NumberOutOfRangeError:
            return False
        same = self._known.names.get(key, "metric", point.name) == point.name
        return same and not math.isinf(point.value)
