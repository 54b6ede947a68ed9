"""From the command to the end of the first optimizer step, against Ray's own guide.

    python benchmarks/start.py [--rounds 5] [--workers 1] [--before FOLDER] [--tiny]

`heliostat train digits` is compared with `tutorial.py`, the same network trained as in Ray's guide
to Ray Train with PyTorch. Ours also checks its spec, starts the tracker and creates a run in
MLflow. It runs twice in each round: cold, when no session of Heliostat runs, and then warm, when
the first command has left one. The guide starts a Ray of its own. Each has run once before in its
folder, so the data set, MLflow's database and compiled Python files exist.

Then runs of 20 steps are compared by the CPU-seconds of all processes, from the command to its
end, with those of the checkout of an earlier commit in `--before`.

Our first step ends when its loss is logged: the timestamp of that metric, which the worker takes
in milliseconds, is read from the run's operation log. The guide's script writes the time itself.
The milestones before that are observed from outside, in the names of all processes every 50 ms:
a process belongs to the command if it has its folder for temporary files.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from contest import compete, finish, leave_out, options, parse, rows, show

MILESTONES = {
    "Ray's first process": "gcs_server",
    "tracker": ":Tracker",
    "Train's controller": "ray::TrainController",
    "Train's worker": r"ray::(Ray)?TrainWorker",
    "torch in the worker": r"ray::execute\.|run_train_fn|ray::TrainWorker\.run",
}
"""Milestone -> regular expression. A process whose command line matches shows that the milestone
has been reached; for the last one, at most 0.3 s before."""
FIRST_STEP, CPU = "first step", "CPU"
PROCESSES = {
    "worker": r"ray::(Ray)?TrainWorker|ray::execute\.|run_train_fn",
    "driver": "heliostat",
    "tracker": ":Tracker",
    "Ray Train's other actors": "ray::",
    "session: services' zygote": "session$",
    "session: workers' zygote": "session-zygote",
    "session: Ray's holder": "session-ray",
    "Ray's services in C++": "gcs_server|raylet",
    "Ray's services in Python": "dashboard|agent|monitor|main",
}
"""Name of a row -> regular expression for a process's title and name; the first that matches."""
LIMIT_S = 120
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
OLD_COMMAND = "import sys; from tuning.main import main; sys.exit(main())"
"""The command of version 0.1.0, to which commit 082b5a4 belongs."""


class Place:
    """A folder to work in, and one for temporary files, by which processes are recognised."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="hb"))  # short: paths of sockets are limited
        self.environment = {**os.environ, "RAY_TMPDIR": str(self.temporary)}
        for name in ("RAY_ADDRESS", "PYTHONPATH", "MLFLOW_TRACKING_URI"):
            self.environment.pop(name, None)

    def end_session(self) -> None:
        command = [str(Path(sys.executable).with_name("heliostat")), "session", "--end"]
        while subprocess.run(command, env=self.environment, capture_output=True).returncode:
            time.sleep(0.2)  # it has not yet seen that the last command has ended

    def close(self) -> None:
        self.end_session()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def observe(self, command: list[str], **environment: str) -> tuple[float, dict[str, float]]:
        """Run a command to its end; its Unix start time, and the seconds to each milestone.

        Also the CPU-seconds that all processes of this place took meanwhile.
        """
        log = self.folder / "log"
        before = self._cpu_s()
        start = time.time()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        seen, used = dict[str, float](), dict[int, float]()
        names = dict[int, str]()
        while process.poll() is None:
            now = time.time() - start
            if now > LIMIT_S:
                os.killpg(process.pid, signal.SIGKILL)
            used |= self._cpu_s()
            for pid in used:
                name = _read(pid, "cmdline").replace("\0", " ")
                short = name if name.startswith("ray::") else _read(pid, "comm").strip()
                names[pid] = short or names.get(pid, "")
                for milestone, pattern in MILESTONES.items():
                    if re.search(pattern, name):
                        seen.setdefault(milestone, now)
            time.sleep(0.05)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{log.read_text()}")
        by_process = defaultdict[str, float](float)
        for pid, cpu_s in used.items():
            kinds = (kind for kind, pattern in PROCESSES.items() if re.search(pattern, names[pid]))
            by_process[next(kinds, "other")] += cpu_s - before.get(pid, 0.0)
        total = sum(by_process.values())
        return start, {**seen, **by_process, CPU: total}

    def _cpu_s(self) -> dict[int, float]:
        """The CPU-seconds so far of each process of this place that lives."""
        mark = f"RAY_TMPDIR={self.temporary}"
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and mark in _read(int(entry.name), "environ").split("\0"):
                fields = _read(int(entry.name), "stat").rpartition(")")[2].split()
                if fields:
                    found[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        return found


def heliostat(
    place: Place, workers: int, steps: int | None, old: Path | None = None
) -> dict[str, float]:
    """The seconds from the command to each milestone, and the CPU-seconds of the whole run."""
    name = f"run-{time.time_ns()}"
    length = (
        {"train.epochs": 0.001} if steps is None else {"train.epochs": "null", "train.steps": steps}
    )
    fields = {**length, "tracking.every_steps": 1, "scale.workers": workers}
    words = [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]
    command, environment = [str(Path(sys.executable).with_name("heliostat"))], {}
    if old is not None:
        command, environment = [sys.executable, "-c", OLD_COMMAND], {"PYTHONPATH": str(old)}
    words = ["train", "digits", "--name", name, *words]
    start, seen = place.observe([*command, *words], **environment)
    log_file = place.folder / "runs" / name / "track" / "spool.jsonl"
    operations = [json.loads(line) for line in log_file.read_text().splitlines()]
    logged = [each["rows"] for each in operations if each["do"] == "log"]
    stamp_ms = next(stamp for each in logged for name, _, _, stamp in each if name == "train/loss")
    return {**seen, FIRST_STEP: stamp_ms / 1e3 - start}


def cold(place: Place, workers: int, steps: int | None) -> dict[str, float]:
    place.end_session()
    return heliostat(place, workers, steps)


def warm(place: Place, workers: int, steps: int | None) -> dict[str, float]:
    if (
        "idle"
        not in subprocess.run(
            [str(Path(sys.executable).with_name("heliostat")), "session"],
            env=place.environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    ):
        heliostat(place, workers, steps)
    time.sleep(5)  # a person takes longer; the session imports the rest of its modules
    return heliostat(place, workers, steps)


def tutorial(place: Place, workers: int) -> dict[str, float]:
    """The same for Ray's guide."""
    from sklearn.datasets import load_digits

    digits, stamp = place.folder / "digits.npz", place.folder / "stamp"
    if not digits.exists():
        bunch = load_digits()
        np.savez(digits, image=bunch.images[:, None].astype(np.float32), label=bunch.target)
    script = str(Path(__file__).with_name("tutorial.py"))
    start, seen = place.observe([sys.executable, script, str(workers), str(digits), str(stamp)])
    return {**seen, FIRST_STEP: float(stamp.read_text()) - start}


def _read(pid: int, name: str) -> str:
    """The text of a file in a process's folder of /proc; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="an earlier checkout")
    args = parse(parser)
    seen: dict[str, list[dict[str, float]]] = defaultdict(list)

    def measure(name: str, key: str, run: Callable[[], dict[str, float]]) -> float:
        seen[name].append(run())
        value = seen[name][-1][key]
        print(f"{name}: {value:.2f}", file=sys.stderr, flush=True)
        return value

    with tempfile.TemporaryDirectory() as folder:
        names = ("cold", "warm", "guide", "before")
        places = {name: Place(Path(folder) / name) for name in names}
        starts: dict[str, Callable[[], dict[str, float]]] = {
            "Heliostat, cold": partial(cold, places["cold"], args.workers, None),
            "Heliostat, warm": partial(warm, places["warm"], args.workers, None),
            "Ray's guide": partial(tutorial, places["guide"], args.workers),
        }
        runs: dict[str, Callable[[], dict[str, float]]] = {
            "20 steps, cold": partial(cold, places["cold"], args.workers, 20),
            "20 steps, warm": partial(warm, places["warm"], args.workers, 20),
        }
        if args.before:
            old = args.before.resolve()
            runs["20 steps, before"] = partial(heliostat, places["before"], args.workers, 20, old)
        else:
            leave_out("20 steps, before", "--before is not given")
        if not args.tiny:
            for run in (*starts.values(), *list(runs.values())[2:]):
                run()
        first = compete(
            {k: partial(measure, k, FIRST_STEP, v) for k, v in starts.items()}, args.rounds
        )
        used = compete({k: partial(measure, k, CPU, v) for k, v in runs.items()}, args.rounds)
        for place in places.values():
            place.close()
    case = f"first step, {args.workers} workers"
    show(case, first, "s", 1.0)
    show("20 steps", used, "CPU-s", 1.0)
    print(f"\n{'seconds until':<24}" + "".join(f"{name:>18}" for name in seen))
    for milestone in [*MILESTONES, FIRST_STEP]:
        line = f"{milestone:<24}"
        for each in seen.values():
            times = [run[milestone] for run in each if milestone in run]
            line += f"{statistics.median(times):>18.2f}" if times else f"{'-':>18}"
        print(line)
    print(f"\n{'CPU-seconds of':<28}" + "".join(f"{name:>18}" for name in runs))
    for kind in [*PROCESSES, "other", CPU]:
        line = f"{kind:<28}"
        for name in runs:
            line += f"{statistics.median(run.get(kind, 0.0) for run in seen[name]):>18.1f}"
        print(line)
    results = []
    for ours in ("Heliostat, cold", "Heliostat, warm"):
        results += rows(f"first step, {ours}", ours, {k: first[k] for k in (ours, "Ray's guide")})
    if args.before:
        for ours in ("20 steps, cold", "20 steps, warm"):
            both = {k: used[k] for k in (ours, "20 steps, before")}
            results += rows(f"CPU-s, {ours}", ours, both)
    finish("start", results)


if __name__ == "__main__":
    main()
