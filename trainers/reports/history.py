"""What a run or sweep has told MLflow, read from its folder: no server is asked."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cluster.base.errors import SpecError
from cluster.cost.ledger import LedgerEntry, read_entries
from trainers.run_folder import LEDGER, TRACKING
from trainers.tracking.operation_log import OPERATION_LOG_FILE, read_operations


@dataclass
class Series:
    """A metric of a run, in the order in which it was told."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class RunHistory:
    """A run as MLflow has it, or will have it when all is sent."""

    key: str
    params: Mapping[str, Any]
    tags: dict[str, str]
    started_ms: int
    last_update_ms: int
    """Time stamp of what was told last."""
    status: str = "RUNNING"
    run_id: str | None = None
    """MLflow's name for it, once it has made it."""
    series: defaultdict[str, Series] = field(default_factory=lambda: defaultdict(Series))

    def latest(self, name: str) -> float | None:
        """The newest value of a metric; None if there is none."""
        return self.series[name].values[-1] if name in self.series else None

    @property
    def latest_values(self) -> dict[str, float]:
        return {name: series.values[-1] for name, series in self.series.items()}


def read_histories(folder: Path) -> dict[str, RunHistory]:
    """The run or sweep in `folder`, first, and its trials, by key.

    Raises SpecError where nothing was tracked yet. Others may be writing to the folder.
    """
    if not (folder / TRACKING / OPERATION_LOG_FILE).exists():
        raise SpecError(f"{folder.name}: nothing was tracked yet")
    found: dict[str, RunHistory] = {}
    for said in read_operations(folder / TRACKING):
        if said["do"] == "start":
            tags, at = dict(said["tags"]), said["at"]
            found[said["key"]] = RunHistory(said["key"], said["params"], tags, at, at)
            continue
        record = found.get(said.get("run", said.get("key", "")))
        if record is None:
            continue
        record.tags |= said.get("tags", {})
        if said["do"] == "log":
            for name, value, step, at in said["rows"]:
                series = record.series[name]
                series.steps.append(step)
                series.values.append(value)
                record.last_update_ms = max(record.last_update_ms, at)
        elif said["do"] == "made":
            record.run_id = said["id"]
        elif said["do"] == "resume":
            record.status = "RUNNING"
        elif said["do"] == "finish":
            record.status, record.last_update_ms = (
                said["status"],
                max(record.last_update_ms, said["at"]),
            )
    if folder.name not in found:
        raise SpecError(f"{folder.name}: nothing was tracked yet")
    return found


class Span(NamedTuple):
    """A time in which a device worked for a run or trial."""

    lane: str
    """The device, or one of the lanes of a device on which several worked at once."""
    key: str
    begin: float
    end: float
    """Unix time."""


def busy_spans(folder: Path, found: Mapping[str, RunHistory]) -> list[Span]:
    """What worked where and when; by place, then in time.

    By the meters, which say the device. Runs that had none, as trials that share one, are there
    from their start to what they told last.
    """
    path = folder / LEDGER
    metered = _metered_spans(read_entries(path)) if path.exists() else {}
    busy = defaultdict(list)
    for (_, key), (where, begin, end) in metered.items():
        if key in found:
            busy[where].append((begin, end, key))
    seen = {key for _, key in metered}
    shared = [record for record in found.values() if record.key not in seen]
    for record in shared:
        if "/" in record.key:
            times = (record.started_ms / 1000, record.last_update_ms / 1000)
            busy["slot"].append((*times, record.key))
    return [span for where, own in sorted(busy.items()) for span in _assign_lanes(where, own)]


def _metered_spans(
    entries: Iterable[LedgerEntry],
) -> dict[tuple[str, str], tuple[str, float, float]]:
    """Session of a meter and who pays -> node and device, begin and end."""
    found: dict[tuple[str, str], tuple[str, float, float]] = {}
    for entry in entries:
        if entry.kind != "energy":
            continue
        name = entry.id.partition("/")[0], entry.run
        place = f"{entry.node} cpu"
        if (entry.usage or {}).get("covers") == "gpu":
            place = f"{entry.node} {entry.device.removeprefix(f'{entry.node}/')}"
        elif name in found:
            place = found[name][0]  # a GPU, whose host's CPUs the same meter looks after
        found[name] = (place, entry.begin, entry.begin + entry.seconds)
    return found


def _assign_lanes(where: str, own: Sequence[tuple[float, float, str]]) -> list[Span]:
    """As few lanes as hold all that overlaps, each in time."""
    ends: list[float] = []
    found = []
    for begin, end, key in sorted(own):
        lane = next((n for n, last in enumerate(ends) if last <= begin), len(ends))
        ends[lane : lane + 1] = [end]
        found.append((lane, key, begin, end))
    many = len(ends) > 1
    return [
        Span(f"{where}, {lane + 1}" if many else where, key, begin, end)
        for lane, key, begin, end in sorted(found, key=lambda each: (each[0], each[2]))
    ]
