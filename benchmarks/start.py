"""From the command to the end of the first optimizer step, against Ray's own guide.

    python benchmarks/start.py [--rounds 5] [--workers 1] [--tiny]

`heliostat train digits` is compared with `tutorial.py`, the same network trained as in Ray's guide
to Ray Train with PyTorch. Ours also checks its spec, starts the tracker and creates a run in
MLflow. Both start a Ray of their own. Each has run once before in its folder, so the data set,
MLflow's database and compiled Python files exist.

Our first step ends when its loss is logged: the timestamp of that metric, which the worker takes
in milliseconds, is read from the run's operation log. The guide's script writes the time itself.
The milestones before that are observed from outside, in the names of all processes every 50 ms.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from contest import compete, finish, options, parse, rows, show

MILESTONES = {
    "Ray's first process": "gcs_server",
    "tracker": ":Tracker",
    "Train's controller": "ray::TrainController",
    "Train's worker": r"ray::(Ray)?TrainWorker",
    "torch in the worker": r"ray::execute\.|run_train_fn|ray::TrainWorker\.run",
}
"""Milestone -> regular expression. A process whose command line matches shows that the milestone
has been reached; for the last one, at most 0.3 s before."""
FIRST_STEP = "first step"
LIMIT_S = 120


def heliostat(workers: int, folder: Path) -> dict[str, float]:
    """Seconds from the command to each milestone."""
    name = f"run-{time.time_ns()}"
    once = {"train.epochs": 0.001, "tracking.every_steps": 1, "scale.workers": workers}
    options = [word for key, value in once.items() for word in ("--set", f"{key}={value}")]
    command = str(Path(sys.executable).with_name("heliostat"))
    start, seen = observe([command, "train", "digits", "--name", name, *options], folder)
    log_file = folder / "runs" / name / "track" / "spool.jsonl"
    operations = [json.loads(line) for line in log_file.read_text().splitlines()]
    first = next(operation for operation in operations if operation["do"] == "log")
    stamp_ms = next(stamp for name, _, _, stamp in first["rows"] if name == "train/loss")
    return {**seen, FIRST_STEP: stamp_ms / 1e3 - start}


def tutorial(workers: int, folder: Path) -> dict[str, float]:
    """Seconds from the command to each milestone."""
    from sklearn.datasets import load_digits

    digits, stamp = folder / "digits.npz", folder / "stamp"
    if not digits.exists():
        bunch = load_digits()
        np.savez(digits, image=bunch.images[:, None].astype(np.float32), label=bunch.target)
    script = str(Path(__file__).with_name("tutorial.py"))
    start, seen = observe([sys.executable, script, str(workers), str(digits), str(stamp)], folder)
    return {**seen, FIRST_STEP: float(stamp.read_text()) - start}


def observe(command: list[str], folder: Path) -> tuple[float, dict[str, float]]:
    """Run a command to its end; returns its Unix start time and the seconds to each milestone."""
    log = folder / "log"
    # Without these, another Ray on this machine would be found and used.
    environment = {**os.environ, "RAY_TMPDIR": str(folder.parent)}
    environment.pop("RAY_ADDRESS", None)
    start = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family, others, seen = {process.pid}, set[int](), dict[str, float]()
    while process.poll() is None:
        now = time.time() - start
        if now > LIMIT_S:
            os.killpg(process.pid, signal.SIGKILL)
        _adopt(family, others)
        for pid in family:
            name = _read(pid, "cmdline").replace("\0", " ")
            for milestone, pattern in MILESTONES.items():
                if re.search(pattern, name):
                    seen.setdefault(milestone, now)
        time.sleep(0.05)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{log.read_text()}")
    return start, seen


def _adopt(family: set[int], others: set[int]) -> None:
    """Add new child processes of the family to it, and all other new processes to the others."""
    alive = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    for pid in sorted(alive - family - others):
        parent = _read(pid, "stat").rpartition(")")[2].split()[1:2]
        (family if parent and int(parent[0]) in family else others).add(pid)


def _read(pid: int, name: str) -> str:
    """The text of a file in a process's folder of /proc; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--workers", type=int, default=1)
    args = parse(parser)
    seen: dict[str, list[dict[str, float]]] = defaultdict(list)

    def first_step(name: str, run: partial[dict[str, float]]) -> float:
        seen[name].append(run())
        return seen[name][-1][FIRST_STEP]

    with tempfile.TemporaryDirectory() as folder:
        contenders = {}
        for name, run in {"Heliostat": heliostat, "Ray's guide": tutorial}.items():
            own = Path(folder) / run.__name__
            own.mkdir()
            if not args.tiny:
                run(args.workers, own)
            contenders[name] = partial(first_step, name, partial(run, args.workers, own))
        measured = compete(contenders, args.rounds)
    case = f"first step, {args.workers} workers"
    show(case, measured, "s", 1.0)
    print(f"\n{'seconds until':<24}" + "".join(f"{name:>16}" for name in seen))
    for milestone in [*MILESTONES, FIRST_STEP]:
        line = f"{milestone:<24}"
        for runs in seen.values():
            times = [run[milestone] for run in runs if milestone in run]
            line += f"{statistics.median(times):>16.2f}" if times else f"{'-':>16}"
        print(line)
    finish("start", rows(case, "Heliostat", measured))


if __name__ == "__main__":
    main()
