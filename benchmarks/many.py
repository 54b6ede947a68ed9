"""10,000 tiny trials in one sweep: the CPU time of each, and the memory, from command to report.

    python benchmarks/many.py [--trials 10000] [--peer-trials 1000] [--rounds 1]
        [--before FOLDER] [--tiny]

The trials are those of a random search over a digits MLP of eight units: one epoch of 12 steps, one
evaluation. So nearly all of the time is what a sweep costs besides training.

| contender | what it is |
|---|---|
| `Heliostat` | `heliostat sweep` with `sweep.fuse: 16`, then `track flush` and `report` |
| `before` | the same with the checkout of an earlier commit in FOLDER |
| `Tune, reused` | Ray Tune with `reuse_actors` and its MLflow callback, see `peers.py` |

Each begins with an empty folder and an existing database of MLflow, in which all of its trials must
be FINISHED at the end, and ends its own Ray. Ours also makes the data set, saves a checkpoint of
each trial, logs the whole spec as parameters, and writes a report. Ray Tune saves nothing, and runs
`--peer-trials`, since 10,000 would take it an hour; its start counts for fewer trials, so its start
is measured with a tenth of them, and taken out.

All processes that have the contender's mark in their environment count. Their CPU time is read
every 0.2 s, so a process loses at most its last 0.2 s. Memory is the peak of the sum of their
proportional set sizes, read every two seconds.
"""

import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from contest import compete, finish, leave_out, options, parse, rows, show

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

DATABASE, LIMIT_S = "mlflow.db", 4 * 3600
CPU_EVERY_S, MEMORY_EVERY_S = 0.2, 2.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
COMMAND = "import sys; from {module} import main; sys.exit(main())"
SPEC: dict[str, Any] = {
    "workload": "models:Mlp",
    "model": {"width": 8},
    "train": {"epochs": 1, "global_batch": 120},
    "sweep": {
        "parameters": {
            "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
            "optimizer.weight_decay": {"loguniform": [1e-4, 1.0]},
        },
        "search": "random",
        "scheduler": {"name": "none"},
        "fuse": 16,
    },
}
KINDS = {
    "engine, trials": "EngineActor|train_trial",
    "tracker": "Tracker",
    "driver": "sweep|peers.py",
    "report": "report",
    "Ray's services": "gcs_server|raylet|agent|monitor|dashboard|log_monitor",
}
"""Kind of process -> words, one of which is in its title; the first kind that fits counts."""


@dataclass(frozen=True)
class Used:
    """What a contender used for its trials, and for its start with none."""

    trials: int
    cpu_s: float
    memory_bytes: int
    wall_s: float


class Usage:
    """Measures the processes that have a mark in their environment, in a thread."""

    def __init__(self, mark: str) -> None:
        self._mark, self._done = mark.encode(), threading.Event()
        self._ours: dict[str, bool] = {}
        self.cpu_s: dict[str, float] = {}
        """Process, by its number and start -> CPU-seconds when it was last seen."""
        self.names: dict[str, str] = {}
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Usage":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def by_kind(self) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for process, seconds in self.cpu_s.items():
            name = self.names[process]
            kinds = (k for k, words in KINDS.items() if any(w in name for w in words.split("|")))
            found[next(kinds, "other")] += seconds
        return dict(found)

    def _watch(self) -> None:
        next_memory_s = 0.0
        while not self._done.wait(CPU_EVERY_S):
            pids = self._read_cpu()
            if time.monotonic() >= next_memory_s:
                self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, pids)))
                next_memory_s = time.monotonic() + MEMORY_EVERY_S

    def _read_cpu(self) -> list[int]:
        pids = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            fields = _read(entry / "stat").rpartition(b")")[2].split()
            if not fields:
                continue
            process = f"{entry.name}-{int(fields[19])}"
            if process not in self._ours:
                self._ours[process] = self._mark in _read(entry / "environ").split(b"\0")
            if self._ours[process]:
                pids.append(int(entry.name))
                self.cpu_s[process] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
                name = _read(entry / "cmdline").replace(b"\0", b" ").decode(errors="replace")
                self.names[process] = name.strip() or self.names.get(process, "")
        return pids


def _read(path: Path) -> bytes:
    """A file of /proc; empty if the process has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _pss_bytes(pid: int) -> int:
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:"))


def environment(temporary: Path, checkout: Path) -> dict[str, str]:
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(checkout), str(HERE)]),
        "RAY_TMPDIR": str(temporary),  # the mark, too
        "HELIOSTAT_SESSION": "off",  # a session would outlive the command
        "OMP_NUM_THREADS": "1",
    }
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        found.pop(name, None)
    return found


def measured(
    commands: list[list[str]], folder: Path, checkout: Path, trials: int, database: Path
) -> Used:
    """Run commands one after another in an empty `folder`; all trials must be in MLflow then."""
    folder.mkdir()
    shutil.copy(database, folder / DATABASE)
    with tempfile.TemporaryDirectory(prefix="hb", ignore_cleanup_errors=True) as temporary:
        began = time.perf_counter()
        with Usage(f"RAY_TMPDIR={temporary}") as usage:
            for command in commands:
                log = folder / f"{len(list(folder.iterdir()))}.log"
                with log.open("wb") as output:
                    code = subprocess.run(
                        command,
                        cwd=folder,
                        env=environment(Path(temporary), checkout),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        timeout=LIMIT_S,
                    ).returncode
                if code:
                    sys.exit(f"{' '.join(command)}: exit code {code}\n{log.read_text()[-4000:]}")
        wall_s = time.perf_counter() - began
    with sqlite3.connect(folder / DATABASE) as connection:
        query = "SELECT count(*) FROM runs WHERE status = 'FINISHED'"
        (finished,) = connection.execute(query).fetchone()
    if finished < trials:
        sys.exit(f"{folder.name}: {finished} of {trials} trials are FINISHED in MLflow")
    kinds = ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in sorted(usage.by_kind().items()))
    total = sum(usage.cpu_s.values())
    print(
        f"{folder.name}: {trials} trials, {wall_s:.0f} s, {total:.0f} CPU-s ({kinds}), "
        f"{usage.peak_bytes / 1e6:.0f} MB",
        flush=True,
    )
    return Used(trials, total, usage.peak_bytes, wall_s)


def heliostat(trials: int, checkout: Path, database: Path, folder: Path) -> Used:
    spec = {**SPEC, "sweep": {**SPEC["sweep"], "trials": trials}}
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(spec))  # which is YAML
    # Version 0.1.0 had its command line elsewhere.
    new = (checkout / "heliostat" / "main.py").exists()
    module = "heliostat.main" if new else "tuning.main"
    python = [sys.executable, "-c", COMMAND.format(module=module)]
    flush = ["track", "flush", "many"] if new else ["flush", "many"]
    commands = [
        [*python, "sweep", str(path), "--name", "many"],
        [*python, *flush],
        [*python, "report", "many"],
    ]
    return measured(commands, folder, checkout, trials, database)


def tune(trials: int, database: Path, folder: Path) -> Used:
    """Ray Tune's trials, without its start, which a tenth of the trials has as well."""
    from fused import write_case

    both = []
    for count in (trials // 10, trials):
        case = folder.with_name(f"{folder.name}-{count}-case")
        case.mkdir()
        write_case({**SPEC, "sweep": {**SPEC["sweep"], "trials": count}}, case)
        command = [sys.executable, str(HERE / "peers.py"), str(case), "tune", "--reuse"]
        command += [
            "--mlflow",
            f"sqlite:///{folder.with_name(f'{folder.name}-{count}')}/{DATABASE}",
        ]
        place = folder.with_name(f"{folder.name}-{count}")
        both.append(measured([command], place, HERE.parent, count, database))
    few, all_of_them = both
    return Used(
        all_of_them.trials - few.trials,
        all_of_them.cpu_s - few.cpu_s,
        all_of_them.memory_bytes,
        all_of_them.wall_s - few.wall_s,
    )


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--peer-trials", type=int)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="an earlier checkout")
    parser.add_argument("--only", nargs="+", choices=("Heliostat", "before", "Tune, reused"))
    args = parse(parser)
    trials = args.trials or (20 if args.tiny else 10_000)
    peer_trials = args.peer_trials or (20 if args.tiny else 1000)
    used: defaultdict[str, list[Used]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="many", ignore_cleanup_errors=True) as home:
        from mlflow import MlflowClient

        database = Path(home) / DATABASE
        MlflowClient(f"sqlite:///{database}").search_experiments()  # makes the tables
        contenders = {"Heliostat": partial(heliostat, trials, HERE.parent, database)}
        if args.before:
            contenders["before"] = partial(heliostat, trials, args.before.resolve(), database)
        else:
            leave_out("before", "--before is not given")
        contenders["Tune, reused"] = partial(tune, peer_trials, database)
        chosen = {name: contenders[name] for name in args.only or contenders}

        def once(name: str) -> float:
            round_number = len(used[name])
            folder = Path(home) / f"{name.replace(', ', '-')}-{round_number}"
            used[name].append(chosen[name](folder))
            return used[name][-1].cpu_s / used[name][-1].trials

        cpu = compete({name: partial(once, name) for name in chosen}, args.rounds)
    memory = {name: [float(each.memory_bytes) for each in found] for name, found in used.items()}
    wall = {name: [each.wall_s / each.trials for each in found] for name, found in used.items()}
    show("CPU per trial", cpu, "ms", 1e3)
    show("time per trial", wall, "ms", 1e3)
    show("peak memory of all processes", memory, "MB", 1e-6)
    results: list[dict[str, Any]] = []
    if "Heliostat" in cpu:
        results += rows("CPU per trial", "Heliostat", cpu) + rows("memory", "Heliostat", memory)
        print(f"\nHeliostat: {statistics.median(memory['Heliostat']) / 1e9:.2f} GB at its peak")
    finish("many", results)


if __name__ == "__main__":
    main()
