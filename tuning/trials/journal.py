"""The journal of a sweep: the parameters of each trial and how it ended, in an append-only file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cluster.base.files import truncate_partial_line


class Repeat(NamedTuple):
    """A trial that trains another one's configuration once more."""

    of: int
    """Number of the trial whose configuration it has."""
    parameters: dict[str, Any]


class Journal:
    """A JSON line per suggestion, per end of a trial, and per trial that runs again after it.

    The file is read once, when the journal is opened. A record is one appended line with one
    fsync, however long the file is: 0.3 to 3 ms on a local disk for the first line as for the
    10,000th. Optuna's `JournalFileBackend` (5.0.0) makes the same fsync, and a lock file besides.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.parameters: dict[int, dict[str, Any]] = {}
        """Trial number -> its suggested parameters."""
        self.suggestions: dict[int, dict[str, Any]] = {}
        """Trial number -> what else the search must know of the suggestion; see `SearchStudy`."""
        self.ends: dict[int, dict[str, Any]] = {}
        """Trial number -> `value` of the metric or None, `step`, and `complete`; with several
        objectives `losses`, and with constraints `violations`. In the order in which they ended."""
        self.earlier: dict[str, list[dict[str, Any]]] = {}
        """Folder of an earlier sweep -> its trials, from which this one learns."""
        self.repeats: dict[int, Repeat] = {}
        """Number of a trial that repeats another one -> which one, with which parameters. These
        trials are not among `parameters` and `ends`: the search does not learn from them."""
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:  # the rest is a partial line
                self._apply(json.loads(line))

    def record_suggestion(
        self,
        trial: int,
        parameters: Mapping[str, Any],
        suggestion: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Returns when the parameters of the trial are on disk."""
        more = {"suggestion": dict(suggestion)} if suggestion else {}
        self._append({"trial": trial, "parameters": dict(parameters), **more})

    def record_end(
        self,
        trial: int,
        value: float | None,
        step: int,
        complete: bool,
        losses: list[float] | None = None,
        violations: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Returns when the end of the trial is on disk."""
        more: dict[str, Any] = {"losses": losses} if losses is not None else {}
        more |= {"violations": dict(violations)} if violations else {}
        self._append({"trial": trial, "value": value, "step": step, "complete": complete, **more})

    def record_earlier(self, folder: str, trials: list[dict[str, Any]]) -> None:
        """Returns when the trials of an earlier sweep are on disk."""
        self._append({"earlier": folder, "trials": trials})

    def record_restart(self, trial: int) -> None:
        """The trial has not ended any more; returns when that is on disk."""
        self._append({"trial": trial, "restarted": True})

    def record_repeat(self, trial: int, of: int, parameters: Mapping[str, Any]) -> None:
        """Returns when it is on disk that a trial repeats another one with these parameters."""
        self._append({"trial": trial, "of": of, "parameters": dict(parameters)})

    @property
    def next_number(self) -> int:
        """The number of the next trial."""
        return len(self.parameters) + len(self.repeats)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a+b") as file:
            truncate_partial_line(file.fileno())
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._apply(entry)

    def _apply(self, entry: dict[str, Any]) -> None:
        if "earlier" in entry:
            self.earlier[entry["earlier"]] = entry["trials"]
        elif "of" in entry:
            self.repeats[entry["trial"]] = Repeat(entry["of"], entry["parameters"])
        elif "restarted" in entry:
            self.ends.pop(entry["trial"], None)
        elif "parameters" in entry:
            self.parameters[entry["trial"]] = entry["parameters"]
            self.suggestions[entry["trial"]] = entry.get("suggestion", {})
        else:
            self.ends[entry["trial"]] = entry
