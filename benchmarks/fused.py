"""One sweep, run in several ways: by Ray Tune, as trials one by one, and fused.

    python benchmarks/fused.py [--case mlp cnn gpt] [--rounds 3] [--only fuse=auto tune-reused]
    python benchmarks/fused.py --tiny        # a few steps of everything, to try the code

It needs the packages of pyproject.toml; Heliostat itself need not be installed. With a GPU the
command is the same: trials then run on the GPU, and there are additional contenders.

| contender | what it is |
|---|---|
| `tune-written` | a function trainable as in Ray's guide, a process per trial |
| `tune-reused` | the same with `reuse_actors`; as many trials at a time as cores |
| `tune-written-N`, `tune-reused-N` | N trials at a time on each GPU: 1, 2, 4, 8 |
| `turn-plain`, `turn-optimizer` | one process, trials one by one; with the fused form of AdamW |
| `turn-compiled`, `turn-graphs` | that with torch.compile; on a GPU also with CUDA graphs |
| `turn-...-threads` | the same with a thread per core; all others have one thread per trial |
| `fuse=off`, `fuse=auto`, `fuse=K` | `heliostat sweep` with this value of `sweep.fuse` |
| `fuse=auto-again` | `fuse=auto`, with the programs that an earlier sweep has compiled |

All have the same trials (drawn once), seeds, scheduler and training rule; the dropout masks differ.
ASHA's decisions depend on the order in which trials report, so the number of steps differs a
little, even between two runs of one contender. Wall time is that of the command from an empty
folder, with compilation and all starts. Caches of compiled programs are empty, except for
`fuse=auto-again`, which has run the same sweep before. Ours also makes its data set, tracks every
trial in MLflow, in an existing database, and saves checkpoints; the others do none of this.

The contenders `turn-...` are timed for a few seconds. Their figure is the time for as many steps as
the sweeps under Tune have done: a start, a compilation, and steps at the speed of the first trial,
without the evaluations and the compilations that further trials need.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
try:
    import torch
    from contest import compete, finish, options, parse, rows, show
    from peers import SWEEP, TRIALS, WARM_UP

    from cluster.base.config import write_yaml
    from trainers.data.dataset import prepare_dataset
    from trainers.spec import resolve
    from tuning.search.searcher import JournaledSearcher
    from tuning.spaces.space import SweepRunSpec, trial_spec_data
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks/fused.py: needs {error.name}, which is not installed here")

CASES: dict[str, dict[str, Any]] = {
    "mlp": {
        "workload": "models:Mlp",
        "model": {"width": 64},
        "train": {"epochs": 200, "global_batch": 16, "evaluate_every_epochs": 10},
        "tracking": {"every_steps": 100},
        "sweep": {
            "parameters": {
                "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
                "optimizer.weight_decay": {"loguniform": [1e-4, 1.0]},
                "model.dropout": {"uniform": [0.0, 0.6]},
            },
            "scheduler": {"grace_epochs": 10},
            "trials": 64,
        },
    },
    "cnn": {
        "workload": "vision",
        "model": {"width": 16},
        "train": {"epochs": 60, "global_batch": 64, "evaluate_every_epochs": 10},
        "sweep": {
            "parameters": {
                "optimizer.lr": {"loguniform": [1e-4, 3e-2]},
                "optimizer.weight_decay": {"loguniform": [1e-4, 1.0]},
                "model.label_smoothing": {"uniform": [0.0, 0.2]},
            },
            "scheduler": {"grace_epochs": 10},
            "trials": 24,
        },
    },
    "gpt": {
        "workload": "models:Chains",
        "data": {"sequences": 512},
        "train": {"epochs": 4, "global_batch": 8, "evaluate_every_epochs": 1},
        "sweep": {
            "parameters": {
                "optimizer.lr": {"loguniform": [1e-4, 1e-2]},
                "optimizer.weight_decay": {"loguniform": [1e-3, 1.0]},
            },
            "scheduler": {"grace_epochs": 1},
            "trials": 12,
        },
    },
}
WIDTHS = (1, 2, 4, 8, 16, 32)
PER_DEVICE = (1, 2, 4, 8)
DATABASE = "mlflow.db"
LIMIT_S = 3600
OURS = "import sys; from heliostat.main import main; sys.exit(main())"

Report = tuple[int, int, float, float]
"""An evaluation: the trial, the number of its steps, the Unix time, and the metric."""


@dataclass(frozen=True)
class Outcome:
    """The result of one contender in one round."""

    wall_s: float
    """Seconds from the command to its end."""
    steps: int
    """Optimizer steps of all trials together."""
    steps_per_s: float
    """Speed of all trials together, once everything has started."""
    best: str = "-"
    """The best of the trials' last evaluations, and its trial."""

    def seconds_for(self, steps: float) -> float:
        return self.wall_s + (steps - self.steps) / self.steps_per_s


def case_data(case: str, tiny: bool) -> dict[str, Any]:
    """The plain spec of a sweep."""
    data = deepcopy(CASES[case])
    sweep, train = data["sweep"], data["train"]
    sweep |= {"search": "random", "metric": "val/loss"}
    if torch.cuda.is_available():
        sweep["resources"] = {"gpu": 1}
    if tiny:
        sweep["trials"] = 4
        train["evaluate_every_epochs"] /= 10
        train["epochs"] = 2 * train["evaluate_every_epochs"]
        sweep["scheduler"]["grace_epochs"] = train["evaluate_every_epochs"]
    return data


def write_case(data: dict[str, Any], folder: Path) -> None:
    """Write the sweep, its trials as our searcher suggests them, and the data set of the peers."""
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{folder / DATABASE}").search_experiments()  # makes the tables
    write_yaml(data, folder / SWEEP)
    spec, workload = resolve(data, SweepRunSpec)
    prepare_dataset(workload, folder)
    search = JournaledSearcher(spec.sweep, folder / "journal.jsonl")
    drawn = [search.suggest(str(number)) for number in range(spec.sweep.trials)]
    paths = spec.sweep.parameters
    trials = [trial_spec_data(data, {path: values[path] for path in paths}) for values in drawn]
    (folder / TRIALS).write_text(json.dumps(trials))


def run(command: list[str], folder: Path, compiled: Path) -> tuple[float, str]:
    """Run a command in `folder`; returns its seconds and the last line of its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        # Without this, another Ray on this machine would be found and used.
        "RAY_TMPDIR": str(folder.parent),
        "TORCHINDUCTOR_CACHE_DIR": str(compiled),
    }
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return seconds, done.stdout.splitlines()[-1]


def peer(arguments: list[str], case: Path, folder: Path) -> tuple[float, str]:
    kind, *options = arguments
    command = [sys.executable, str(HERE / "peers.py"), str(case), kind, *options]
    return run(command, folder, folder.parent / "compiled")


def tune(arguments: list[str], case: Path, folder: Path) -> Outcome:
    wall_s, last = peer(["tune", *arguments], case, folder)
    return outcome(wall_s, [tuple(report) for report in json.loads(last)])


def in_turn(arguments: list[str], case: Path, folder: Path) -> Outcome:
    wall_s, last = peer(["turn", *arguments], case, folder)
    found = json.loads(last)
    return Outcome(wall_s, WARM_UP + found["steps"], found["steps"] / found["seconds"])


def heliostat(fuse: str, case: Path, folder: Path) -> Outcome:
    fuse, _, again = fuse.partition("-")
    compiled = case / "compiled" if again else folder.parent / "compiled"
    if again and not compiled.exists():
        first = folder.with_name("first")
        first.mkdir()
        sweep(fuse, case, first, compiled)
    return sweep(fuse, case, folder, compiled)


def sweep(fuse: str, case: Path, folder: Path, compiled: Path) -> Outcome:
    shutil.copy(case / DATABASE, folder)
    command = ["sweep", str(case / SWEEP), "--name", "sweep", "--set", f"sweep.fuse={fuse}"]
    wall_s, _ = run([sys.executable, "-c", OURS, *command], folder, compiled)
    reports: list[Report] = []
    for line in (folder / "runs" / "sweep" / "track" / "spool.jsonl").read_text().splitlines():
        operation = json.loads(line)
        for name, value, step, stamp_ms in operation.get("rows", ()):
            if name == "val/loss":
                trial = int(operation["run"].rpartition("/")[2])
                reports.append((trial, step, stamp_ms / 1e3, value))
    return outcome(wall_s, reports)


def outcome(wall_s: float, reports: list[Report]) -> Outcome:
    """The outcome of a sweep. Its speed is the slope of steps over time in the middle half."""
    last: dict[int, Report] = {}
    done = []
    for report in sorted(reports, key=lambda report: report[2]):
        last[report[0]] = report
        done.append((report[2], sum(steps for _, steps, _, _ in last.values())))
    quarter = len(done) // 4
    stamps, totals = zip(*done[quarter : len(done) - quarter], strict=True)
    value, trial = min((value, trial) for trial, _, _, value in last.values())
    speed = statistics.linear_regression(stamps, totals).slope
    return Outcome(wall_s, done[-1][1], speed, f"{value:.4f} (trial {trial})")


def contenders() -> dict[str, Callable[[Path, Path], Outcome]]:
    """Name -> a function that runs a case in an empty folder."""
    found: dict[str, Callable[[Path, Path], Outcome]] = {}
    gpu = torch.cuda.is_available()
    for name, options in {"tune-written": [], "tune-reused": ["--reuse"]}.items():
        if gpu:
            for count in PER_DEVICE:
                found[f"{name}-{count}"] = partial(tune, [*options, f"--per-device={count}"])
        else:
            found[name] = partial(tune, options)
    turns = {
        "turn-plain": [],
        "turn-optimizer": ["--fused"],
        "turn-compiled": ["--fused", "--compile=default"],
    }
    if gpu:
        turns["turn-graphs"] = ["--fused", "--compile=reduce-overhead"]
    else:
        threads = [f"--threads={os.cpu_count()}"]
        turns |= {f"{name}-threads": [*options, *threads] for name, options in turns.items()}
    for name, options in turns.items():
        found[name] = partial(in_turn, options)
    for fuse in ("off", "auto", "auto-again", *map(str, WIDTHS)):
        found[f"fuse={fuse}"] = partial(heliostat, fuse)
    return found


def measure(
    case: str, chosen: Mapping[str, Callable[[Path, Path], Outcome]], rounds: int, tiny: bool
) -> dict[str, list[Outcome]]:
    """The outcomes of each contender, one for each round."""
    outcomes: dict[str, list[Outcome]] = defaultdict(list)

    def once(name: str, home: Path) -> float:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary) / "empty"
            folder.mkdir()
            found = chosen[name](home, folder)
        print(f"{case}, {name}: {found.wall_s:.1f} s", flush=True)
        outcomes[name].append(found)
        return found.wall_s

    with tempfile.TemporaryDirectory() as home:
        write_case(case_data(case, tiny), Path(home))
        compete({name: partial(once, name, Path(home)) for name in chosen}, rounds)
    return outcomes


def judge(case: str, outcomes: Mapping[str, list[Outcome]]) -> list[dict[str, Any]]:
    """Print a case; returns the rows that compare `fuse=auto` with each other contender."""
    sweeps = {name: found for name, found in outcomes.items() if not name.startswith("turn")}
    done = [each.steps for found in sweeps.values() for each in found]
    measured = {name: [each.wall_s for each in found] for name, found in sweeps.items()}
    if done:  # otherwise the number of the sweep's steps is unknown
        for name in outcomes.keys() - sweeps.keys():
            times = [each.seconds_for(statistics.median(done)) for each in outcomes[name]]
            measured[name] = times
    show(f"{case}, whole sweep", measured, "s", 1.0)
    print(f"\n{case:<24} {'steps/s':>9} {'steps':>9}   best")
    for name, found in outcomes.items():
        speed = statistics.median(each.steps_per_s for each in found)
        steps = statistics.median(each.steps for each in found)
        print(f"{name:<24} {speed:>9.1f} {steps:>9.0f}   {', '.join(each.best for each in found)}")
    return rows(case, "fuse=auto", measured) if "fuse=auto" in measured else []


def main() -> None:
    available = contenders()
    parser = options(__doc__, rounds=3)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=available, metavar="NAME")
    args = parse(parser)
    if args.tiny:
        args.only = args.only or ["fuse=auto", "turn-plain"]
        args.case = args.case if args.case != list(CASES) else ["mlp"]
    results: list[dict[str, Any]] = []
    for case in args.case:
        chosen = {name: available[name] for name in args.only or available}
        results += judge(case, measure(case, chosen, args.rounds, args.tiny))
    finish("fused", results)


if __name__ == "__main__":
    main()
