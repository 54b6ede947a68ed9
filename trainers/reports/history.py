"""The history of a run or sweep, read from its operation log and ledger; no server is asked."""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cluster.base.errors import SpecError
from cluster.cost.ledger import LedgerEntry, read_entries
from trainers.run_folder import LEDGER, TRACKING
from trainers.tracking.operation_log import END_TAGS, OPERATION_LOG_FILE, read_operations


@dataclass
class Series:
    """The points of a metric, in the order in which they were logged.

    They are arrays in the histories of runs: a sweep of 10,000 trials has millions of points.
    """

    steps: MutableSequence[int] = field(default_factory=lambda: array("q"))
    values: MutableSequence[float] = field(default_factory=lambda: array("d"))


@dataclass
class RunHistory:
    """A run as MLflow has it, or will have it when everything is sent, without the points that are
    no part of its past any more."""

    key: str
    params: Mapping[str, Any]
    tags: dict[str, str]
    started_ms: int
    last_update_ms: int
    """Timestamp of the newest metric or, when the run has ended, of its end: costs come later."""
    status: str = "RUNNING"
    run_id: str | None = None
    """MLflow's id of the run; None before it exists there."""
    series: defaultdict[str, Series] = field(default_factory=lambda: defaultdict(Series))

    def latest(self, name: str) -> float | None:
        """The newest value of a metric; None if it was never logged."""
        values = self.series[name].values if name in self.series else []
        return values[-1] if values else None

    @property
    def latest_values(self) -> dict[str, float]:
        return {name: series.values[-1] for name, series in self.series.items() if series.values}


def read_histories(folder: Path) -> dict[str, RunHistory]:
    """Key -> history: first the run or sweep in `folder`, then the trials.

    Raises SpecError where nothing was tracked yet. Another process may be writing to the folder.
    """
    if not (folder / TRACKING / OPERATION_LOG_FILE).exists():
        raise SpecError(f"{folder.name}: nothing was tracked yet")
    histories: dict[str, RunHistory] = {}
    for operation in read_operations(folder / TRACKING):
        if operation["do"] == "start":
            key, tags, at = operation["key"], dict(operation["tags"]), operation["at"]
            histories[key] = RunHistory(key, operation["params"], tags, at, at)
            continue
        run = histories.get(operation.get("run", operation.get("key", "")))
        if run is not None:
            _apply(operation, run)
    if folder.name not in histories:
        raise SpecError(f"{folder.name}: nothing was tracked yet")
    return histories


def _apply(operation: Mapping[str, Any], run: RunHistory) -> None:
    if operation["do"] == "resume":
        run.tags = {name: text for name, text in run.tags.items() if name not in END_TAGS}
    run.tags |= operation.get("tags", {})
    if operation["do"] == "log":
        for name, value, step, timestamp_ms in operation["rows"]:
            if not -(2**63) <= step < 2**63:  # MLflow refuses it too
                continue
            series = run.series[name]
            series.steps.append(step)
            series.values.append(value)
            if run.status == "RUNNING":
                run.last_update_ms = max(run.last_update_ms, timestamp_ms)
    elif operation["do"] == "rewind":
        for series in run.series.values():
            kept = [n for n, step in enumerate(series.steps) if step < operation["step"]]
            series.steps = array("q", [series.steps[n] for n in kept])
            series.values = array("d", [series.values[n] for n in kept])
    elif operation["do"] == "made":
        run.run_id = operation["id"]
    elif operation["do"] == "resume":
        run.status = "RUNNING"
    elif operation["do"] == "finish":
        if run.status == "RUNNING":
            run.last_update_ms = max(run.last_update_ms, operation["at"])
        run.status = operation["status"]


class Span(NamedTuple):
    """A period in which a device worked on a run or trial."""

    lane: str
    """The device; or one of its lanes, where it worked on several at once."""
    key: str
    begin: float
    end: float
    """Unix time."""


def busy_spans(folder: Path, histories: Mapping[str, RunHistory]) -> list[Span]:
    """When each device worked on which run or trial, sorted by lane, then by time.

    The devices and times are those of the meters. Trials without a meter, which share a device,
    are assumed to run from their start to their last update.
    """
    path = folder / LEDGER
    metered = _metered_spans(read_entries(path)) if path.exists() else {}
    busy = defaultdict(list)
    for (_, key), (device, begin, end) in metered.items():
        if key in histories:
            busy[device].append((begin, end, key))
    with_meter = {key for _, key in metered}
    for run in histories.values():
        if run.key not in with_meter and "/" in run.key:
            busy["slot"].append((run.started_ms / 1000, run.last_update_ms / 1000, run.key))
    return [span for device, own in sorted(busy.items()) for span in _assign_lanes(device, own)]


def _metered_spans(
    entries: Iterable[LedgerEntry],
) -> dict[tuple[str, str], tuple[str, float, float]]:
    """(Session of a meter, key of the run) -> node and device, begin, end."""
    found: dict[tuple[str, str], tuple[str, float, float]] = {}
    for entry in entries:
        if entry.kind != "energy":
            continue
        session_and_key = entry.id.partition("/")[0], entry.run
        device = f"{entry.node} cpu"
        if (entry.usage or {}).get("covers") == "gpu":
            device = f"{entry.node} {entry.device.removeprefix(f'{entry.node}/')}"
        elif session_and_key in found:
            device = found[session_and_key][0]  # a GPU; the same meter also covers its host's CPUs
        found[session_and_key] = (device, entry.begin, entry.begin + entry.seconds)
    return found


def _assign_lanes(device: str, busy: Sequence[tuple[float, float, str]]) -> list[Span]:
    """The fewest lanes in which no two periods overlap; sorted by time in each lane."""
    ends: list[float] = []
    found = []
    for begin, end, key in sorted(busy):
        lane = next((n for n, last in enumerate(ends) if last <= begin), len(ends))
        ends[lane : lane + 1] = [end]
        found.append((lane, key, begin, end))
    several = len(ends) > 1
    return [
        Span(f"{device}, {lane + 1}" if several else device, key, begin, end)
        for lane, key, begin, end in sorted(found, key=lambda each: (each[0], each[2]))
    ]
