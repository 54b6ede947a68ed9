"""The rooms of the house: what each is for, what it may import, and what it does import.

    python -m tests.layout     prints the rooms, their sizes and their arrows

A room is a package; `trainers` and `tuning` themselves, without the packages in them, are rooms
too. `CONTRACTS` is the plan: a room may import the rooms it names, and all of them stand above it.
"""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[1]
PACKAGES = ("cluster", "trainers", "tuning", "heliostat")


@dataclass(frozen=True)
class Contract:
    """What a room is for, and which rooms it may import."""

    purpose: str
    imports: tuple[str, ...] = ()


def _in(package: str, *rooms: str) -> tuple[str, ...]:
    return tuple(f"{package}.{room}" if room else package for room in rooms)


_CLUSTER = _in("cluster", "base", "cost", "connection")
_RUN = (*_in("trainers", "", "data", "checkpoints", "modeling", "engine"), *_CLUSTER)
_TRIALS = (*_RUN, *_in("trainers", "tracking", "runs"))

CONTRACTS = {
    "cluster.base": Contract("specs as data, errors, files, the terminal"),
    "cluster.cost": Contract(
        "what machines cost, draw and emit, and limits on it; no Ray", _in("cluster", "base")
    ),
    "cluster.connection": Contract(
        "the ways to Ray: its address, token, job server and SSH; all that is private to its core",
        _in("cluster", "base"),
    ),
    "cluster.definition": Contract(
        "a cluster's spec to the files of each provider; no network", _CLUSTER
    ),
    "cluster.jobs": Contract(
        "runs as Ray jobs: packaged, started once, started again, followed",
        _in("cluster", "base", "connection"),
    ),
    "cluster.lifecycle": Contract(
        "from a cluster's file to a running cluster and back",
        _in("cluster", "base", "connection", "definition"),
    ),
    "cluster.node": Contract(
        "programs that run on the hosts, each of which can be started again",
        _in("cluster", "base", "connection"),
    ),
    "cluster.cli": Contract(
        "the verbs of clusters and jobs: arguments, and what is printed",
        (*_CLUSTER, *_in("cluster", "definition", "jobs", "lifecycle")),
    ),
    "trainers": Contract(
        "what a run is: spec, workload, device, worker, folder, stores, counted randomness",
        _in("cluster", "base", "cost"),
    ),
    "trainers.data": Contract(
        "from a workload to batches whose order is a function of seed and position",
        (*_in("cluster", "base"), *_in("trainers", "")),
    ),
    "trainers.checkpoints": Contract(
        "a run's state to disk and back, whole or not there; exported models",
        (*_in("cluster", "base"), *_in("trainers", "")),
    ),
    "trainers.modeling": Contract(
        "from a workload to a model that is ready to train: strategy, dropout, optimizer",
        (*_in("cluster", "base"), *_in("trainers", "")),
    ),
    "trainers.engine": Contract(
        "the training loop in one process of a group; knows neither Ray nor MLflow",
        (*_in("cluster", "base"), *_in("trainers", "", "data", "checkpoints", "modeling")),
    ),
    "trainers.tracking": Contract(
        "one writer to MLflow, behind a log on disk",
        (*_CLUSTER, *_in("trainers", "", "checkpoints", "engine")),
    ),
    "trainers.planning": Contract(
        "arithmetic on probes: forecasts and plans; starts nothing",
        (*_in("cluster", "base", "cost"), *_in("trainers", "", "engine")),
    ),
    "trainers.runs": Contract(
        "a run from its spec to its end, under Ray Train",
        (*_RUN, *_in("cluster", "jobs"), *_in("trainers", "tracking", "planning")),
    ),
    "trainers.probes": Contract(
        "short runs that are measured, for the plan and the scaling study",
        (*_RUN, *_in("trainers", "tracking", "planning", "runs")),
    ),
    "trainers.reports": Contract(
        "a run's folder to a page of charts",
        (*_in("cluster", "base", "cost"), *_in("trainers", "", "tracking", "planning")),
    ),
    **{
        f"trainers.workloads.{name}": Contract(
            purpose, (*_in("cluster", "base"), *_in("trainers", "", "data"))
        )
        for name, purpose in {
            "vision": "image recognition: a ResNet, a vision transformer",
            "language": "natural and programming language: a GPT",
            "folding": "the backbone of a protein from its sequence and contacts",
            "markets": "which way the price of an order book moves",
            "dynamics": "molecular dynamics: energies and forces of atoms",
            "hedging": "how to hedge an option that was sold",
        }.items()
    },
    "trainers.cli": Contract(
        "the verbs of runs: arguments, and what is printed",
        (
            *_RUN,
            *_in("cluster", "cli", "jobs"),
            *_in("trainers", "tracking", "planning", "runs", "probes", "reports"),
        ),
    ),
    "tuning.trials": Contract(
        "which trials there are, who goes on, what they cost; one trial in a process", _TRIALS
    ),
    "tuning.programs": Contract(
        "many trials as one program: traced, batched and compiled",
        (*_in("cluster", "base"), *_in("trainers", "", "data", "modeling", "engine")),
    ),
    "tuning.fused": Contract(
        "engines that train trials in the slots of programs, and Ray Tune's view of them",
        (*_TRIALS, *_in("tuning", "trials", "programs")),
    ),
    "tuning": Contract(
        "a sweep from its spec to its end", (*_TRIALS, *_in("tuning", "trials", "fused"))
    ),
    "tuning.reports": Contract(
        "what a sweep came to, as a page",
        (*_in("cluster", "base"), *_in("trainers", "", "tracking", "reports"), "tuning.trials"),
    ),
    "tuning.cli": Contract(
        "the verbs of sweeps, and the parser that has all verbs",
        (
            *_TRIALS,
            *_in("cluster", "cli", "jobs"),
            *_in("trainers", "cli", "reports"),
            *_in("tuning", "", "trials", "reports"),
        ),
    ),
    "heliostat": Contract(
        "the names that users import, and the command line's entry",
        ("cluster.base", "trainers", "tuning.cli"),
    ),
}


@dataclass(frozen=True)
class Import:
    """One import statement of ours, wherever in the file it stands."""

    path: Path
    line: int
    module: str
    """The full name of what is imported: a module, or a name in one."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: imports {self.module}"


@functools.cache
def sources() -> list[Path]:
    """Every Python file of the packages, relative to the root."""
    return sorted(
        path.relative_to(HOME) for package in PACKAGES for path in (HOME / package).rglob("*.py")
    )


def room_of(module: str) -> str | None:
    """The room in which a dotted name lies; None for what is not ours."""
    parts = module.split(".")
    for length in (3, 2):
        name = ".".join(parts[:length])
        if len(parts) >= length and name in CONTRACTS:
            return name
    return parts[0] if parts[0] in PACKAGES else None


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a file's syntax tree."""
    return list(ast.walk(ast.parse((HOME / path).read_text())))


@functools.cache
def imports(path: Path) -> list[Import]:
    package = path.parent.parts
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*around, *([node.module] if node.module else [])))
            found += [Import(path, node.lineno, f"{module}.{name.name}") for name in node.names]
    return found


def files_of(room: str) -> list[Path]:
    """The files of a room, without those of the rooms inside it."""
    return [path for path in sources() if room_of(".".join(path.with_suffix("").parts)) == room]


def arrows(room: str) -> dict[str, list[Import]]:
    """The rooms that a room imports, each with the statements that do so."""
    found: dict[str, list[Import]] = {}
    for path in files_of(room):
        for each in imports(path):
            other = room_of(each.module)
            if other is not None and other != room:
                found.setdefault(other, []).append(each)
    return found


def size_of(path: Path) -> int:
    """Lines."""
    return len((HOME / path).read_text().splitlines())


def describe(room: str) -> str:
    """A few lines: purpose, sizes, arrows."""
    modules = [path for path in files_of(room) if path.name != "__init__.py"]
    lines = [
        f"{room}: {CONTRACTS[room].purpose}",
        f"    {len(modules)} files, {sum(map(size_of, modules)):,} lines",
    ]
    for other, statements in sorted(arrows(room).items()):
        lines.append(f"    -> {other} ({len(statements)})")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(map(describe, CONTRACTS)))
