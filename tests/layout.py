"""The rooms of the code: the purpose of each, the rooms that it may import, and its imports.

    python -m tests.layout     prints the rooms, their sizes and their arrows (imports)

A room is a package; the modules of `trainers` and `tuning` themselves, without the packages in
them, are rooms too. `CONTRACTS` is the table of what is allowed: a room may import the rooms that
its contract names, all of which are above it in the table.
"""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[1]
PACKAGES = ("cluster", "trainers", "tuning", "heliostat")


@dataclass(frozen=True)
class Contract:
    """The purpose of a room, and the rooms that it may import."""

    purpose: str
    imports: tuple[str, ...] = ()


def _in(package: str, *rooms: str) -> tuple[str, ...]:
    return tuple(f"{package}.{room}" if room else package for room in rooms)


_CLUSTER = _in("cluster", "base", "cost", "connection")
_RUN = (*_in("trainers", "", "data", "checkpoints", "checks", "modeling", "engine"), *_CLUSTER)
_TRIALS = (*_RUN, *_in("trainers", "tracking", "runs"))

CONTRACTS = {
    "cluster.base": Contract("specs as data, errors, files, the terminal"),
    "cluster.cost": Contract(
        "price, power and emissions of machines, and limits on them; no Ray", _in("cluster", "base")
    ),
    "cluster.connection": Contract(
        "connections to Ray: address, token, job server, SSH; everything private to Ray's core",
        _in("cluster", "base"),
    ),
    "cluster.zygote": Contract(
        "a process that has imported torch and Ray, and forks Ray's processes and commands",
        _in("cluster", "base", "connection"),
    ),
    "cluster.session": Contract(
        "this machine's session: its zygotes, and a Ray that stays warm between commands",
        _in("cluster", "base", "connection", "zygote"),
    ),
    "cluster.definition": Contract(
        "a cluster's spec, and the files of each provider made from it; no network", _CLUSTER
    ),
    "cluster.jobs": Contract(
        "runs as Ray jobs: packaged, started once, started again if lost, followed",
        _in("cluster", "base", "connection"),
    ),
    "cluster.lifecycle": Contract(
        "starts and stops the cluster of a file, and shows its status",
        _in("cluster", "base", "connection", "definition"),
    ),
    "cluster.node": Contract(
        "programs that run on the hosts, each of which can be restarted at any time",
        _in("cluster", "base", "connection"),
    ),
    "cluster.cli": Contract(
        "the verbs of clusters and jobs: arguments and printed output",
        (*_CLUSTER, *_in("cluster", "session", "definition", "jobs", "lifecycle")),
    ),
    "trainers": Contract(
        "the parts of a run: spec, workload, device, worker, folder, stores, counter-based RNG",
        _in("cluster", "base", "cost"),
    ),
    "trainers.data": Contract(
        "data sets of a workload, and batches whose order is a function of seed and position",
        (*_in("cluster", "base"), *_in("trainers", "")),
    ),
    "trainers.checks": Contract(
        "checks of what workloads return, of modes and of numbers that are not finite",
        (*_in("cluster", "base"), *_in("trainers", "")),
    ),
    "trainers.modeling": Contract(
        "makes a workload's model ready to train: parallel strategy, dropout, optimizer",
        (*_in("cluster", "base"), *_in("trainers", "", "checks")),
    ),
    "trainers.checkpoints": Contract(
        "saves and loads a run's state, complete or not at all; exported models",
        (*_in("cluster", "base"), *_in("trainers", "", "checks", "modeling")),
    ),
    "trainers.engine": Contract(
        "the training loop in one process of a group; knows neither Ray nor MLflow",
        (
            *_in("cluster", "base"),
            *_in("trainers", "", "data", "checkpoints", "checks", "modeling"),
        ),
    ),
    "trainers.tracking": Contract(
        "one writer to MLflow, behind an operation log on disk",
        (*_CLUSTER, *_in("trainers", "", "checkpoints", "engine")),
    ),
    "trainers.planning": Contract(
        "computes forecasts and plans from probes; starts nothing",
        (*_in("cluster", "base", "cost"), *_in("trainers", "")),
    ),
    "trainers.runs": Contract(
        "a run from its spec to its end, under Ray Train",
        (*_RUN, *_in("cluster", "session", "jobs"), *_in("trainers", "tracking", "planning")),
    ),
    "trainers.probes": Contract(
        "short measured runs, for the plan and the scaling study",
        (*_RUN, *_in("trainers", "tracking", "planning", "runs")),
    ),
    "trainers.reports": Contract(
        "makes a page of charts from a run's folder",
        (*_in("cluster", "base", "cost"), *_in("trainers", "", "tracking")),
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
            "hedging": "the price of an option, and how to hedge it",
        }.items()
    },
    "trainers.cli": Contract(
        "the verbs of runs: arguments and printed output",
        (
            *_RUN,
            *_in("cluster", "session", "cli", "jobs"),
            *_in("trainers", "tracking", "planning", "runs", "probes", "reports"),
        ),
    ),
    "tuning.stopping": Contract(
        "rules of early stopping, and fronts of several objectives: arithmetic alone"
    ),
    "tuning.spaces": Contract(
        "what a sweep varies, wants and compares, as its spec says it",
        (*_in("cluster", "base"), *_in("trainers", ""), *_in("tuning", "stopping")),
    ),
    "tuning.trials": Contract(
        "journal, budget and leaderboard of trials; one trial in a process",
        (*_TRIALS, *_in("tuning", "stopping", "spaces")),
    ),
    "tuning.search": Contract(
        "what Ray Tune asks for: the next trial's parameters, and which trials go on",
        (*_TRIALS, *_in("tuning", "stopping", "spaces", "trials")),
    ),
    "tuning.programs": Contract(
        "many trials as one program: traced, batched and compiled",
        (*_in("cluster", "base"), *_in("trainers", "", "data", "checks", "modeling", "engine")),
    ),
    "tuning.fused": Contract(
        "engines that train trials in the slots of programs, and their adapter to Ray Tune",
        (*_TRIALS, *_in("tuning", "spaces", "trials", "search", "programs")),
    ),
    "tuning": Contract(
        "a sweep from its spec to its end",
        (*_TRIALS, *_in("tuning", "spaces", "trials", "search", "fused")),
    ),
    "tuning.reports": Contract(
        "makes a page of charts from a sweep's folder",
        (
            *_in("cluster", "base"),
            *_in("trainers", "", "tracking", "reports"),
            *_in("tuning", "spaces", "trials"),
        ),
    ),
    "tuning.cli": Contract(
        "the verbs of sweeps, and the parser with all verbs",
        (
            *_TRIALS,
            *_in("cluster", "cli", "jobs"),
            *_in("trainers", "cli", "reports"),
            *_in("tuning", "", "spaces", "trials", "search", "fused", "reports"),
        ),
    ),
    "heliostat": Contract(
        "the names that users import, and the entry of the command line",
        ("cluster.base", "cluster.session", "trainers", "tuning.cli"),
    ),
}


@dataclass(frozen=True)
class Import:
    """One import statement in our code, at any place in a file."""

    path: Path
    line: int
    module: str
    """The full name of the imported module, or of the imported name in a module."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: imports {self.module}"


@functools.cache
def sources() -> list[Path]:
    """Every Python file of the packages, relative to the root."""
    return sorted(
        path.relative_to(HOME) for package in PACKAGES for path in (HOME / package).rglob("*.py")
    )


def room_of(module: str) -> str | None:
    """The room of a dotted name; None for names of other projects."""
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
    """The files of a room, without the files of rooms inside it."""
    return [path for path in sources() if room_of(".".join(path.with_suffix("").parts)) == room]


def arrows(room: str) -> dict[str, list[Import]]:
    """The rooms that a room imports, each with its import statements."""
    found: dict[str, list[Import]] = {}
    for path in files_of(room):
        for each in imports(path):
            other = room_of(each.module)
            if other is not None and other != room:
                found.setdefault(other, []).append(each)
    return found


def size_of(path: Path) -> int:
    """The number of lines of a file."""
    return len((HOME / path).read_text().splitlines())


def describe(room: str) -> str:
    """A few lines about a room: purpose, size, arrows."""
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
