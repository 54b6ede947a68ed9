"""The journal of a sweep: the parameters of each trial, what pbt changed of them, and how it ended.

One process writes it: the sweep's driver. Trials of pbt read it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from cluster.base.files import truncate_partial_line


class Repeat(NamedTuple):
    """A trial that trains another one's configuration once more."""

    of: int
    """Number of the trial whose configuration it has."""
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A trial goes on with another trial's state, and with other parameters."""

    step: int
    """Steps of that state."""
    parameters: Mapping[str, Any]
    """All parameters of the trial from that step on."""
    donor: int | None
    """The other trial; None where that is unknown."""
    donor_changes: int
    """How many changes of the other trial had been made to the state."""


class Journal:
    """A JSON line per suggestion, change and end of a trial, and where an ended one runs again.

    The file is read once, when the journal is opened; before each record, what another object has
    appended is read as well. A record is one appended line with one fsync, however long the file
    is: 0.3 to 3 ms on a local disk for the first line as for the 10,000th. Optuna's
    `JournalFileBackend` (5.0.0) makes the same fsync, and a lock file besides.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.parameters: dict[int, dict[str, Any]] = {}
        """Trial number -> its suggested parameters, with which it began."""
        self.suggestions: dict[int, dict[str, Any]] = {}
        """Trial number -> what else the search must know of the suggestion; see `SearchStudy`."""
        self.changes: dict[int, list[Change]] = {}
        """Trial number -> the changes of the trial, if there were any."""
        self.ends: dict[int, dict[str, Any]] = {}
        """Trial number -> `value` of the metric or None, `step`, and `complete`; with several
        objectives `losses`, and with constraints `violations`. In the order in which they ended."""
        self.earlier: dict[str, list[dict[str, Any]]] = {}
        """Folder of an earlier sweep -> its trials, from which this one learns."""
        self.repeats: dict[int, Repeat] = {}
        """Number of a trial that repeats another one -> which one, with which parameters. These
        trials are not among `parameters` and `ends`: the search does not learn from them."""
        self._read_bytes = 0
        self.refresh()

    def refresh(self) -> None:
        """Read what another object has appended."""
        if self._path.exists():
            with self._path.open("rb") as file:
                self._read_new(file)

    def record_suggestion(
        self,
        trial: int,
        parameters: Mapping[str, Any],
        suggestion: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Returns when the parameters of the trial are on disk."""
        more = {"suggestion": dict(suggestion)} if suggestion else {}
        self._append({"trial": trial, "parameters": dict(parameters), **more})

    def record_change(self, trial: int, change: Change) -> None:
        """Returns when the change of the trial is on disk."""
        self._append({"trial": trial, "change": asdict(change)})

    def parameters_after(self, trial: int, changes: int | None = None) -> Mapping[str, Any]:
        """A trial's parameters after so many of its changes, or after all of them."""
        made = self.changes.get(trial, [])[:changes]
        return made[-1].parameters if made else self.parameters[trial]

    def schedule(self, trial: int, changes: int) -> list[tuple[int, Mapping[str, Any]]] | None:
        """How the state of a trial after so many of its changes came about.

        First step and parameters of each part of the training, whichever trials did it; None if a
        part is unknown.
        """
        if changes == 0:
            return [(0, self.parameters[trial])]
        last = self.changes[trial][changes - 1]
        before = None if last.donor is None else self.schedule(last.donor, last.donor_changes)
        if before is None:
            return None
        return [part for part in before if part[0] < last.step] + [(last.step, last.parameters)]

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
            self._read_new(file)
            line = json.dumps(entry).encode() + b"\n"
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._read_bytes += len(line)
        self._apply(entry)

    def _read_new(self, file: IO[bytes]) -> None:
        """Apply the lines from where reading has ended; a partial line is left for later."""
        file.seek(self._read_bytes)
        for line in file.read().split(b"\n")[:-1]:
            self._read_bytes += len(line) + 1
            self._apply(json.loads(line))

    def _apply(self, entry: dict[str, Any]) -> None:
        if "earlier" in entry:
            self.earlier[entry["earlier"]] = entry["trials"]
        elif "change" in entry:
            self.changes.setdefault(entry["trial"], []).append(Change(**entry["change"]))
        elif "of" in entry:
            self.repeats[entry["trial"]] = Repeat(entry["of"], entry["parameters"])
        elif "restarted" in entry:
            self.ends.pop(entry["trial"], None)
        elif "parameters" in entry:
            self.parameters[entry["trial"]] = entry["parameters"]
            self.suggestions[entry["trial"]] = entry.get("suggestion", {})
        else:
            self.ends[entry["trial"]] = entry
