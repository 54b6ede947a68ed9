"""The time from kill -9 of a worker to the next new step, and the number of repeated steps.

    python benchmarks/recovery.py [--rounds 3] [--workers 1] [--tiny]

The digits network is trained on one worker, which kills itself once, at the beginning of step 60
of 80; of several workers, the first to begin it does. `heliostat train` saves a checkpoint every
ten steps. It is compared with the loop of Ray's guide to saving and loading checkpoints, which
reports one per epoch (22.5 steps here). Each starts a Ray of its own; ours is the one of a session,
which is ended after the run.

Each process records when it was created and when it begins a step. So the time has three parts:
until a new worker process exists, until it begins its first step, and the steps that it repeats.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import guide
from contest import compete, finish, options, parse, rows, show

from trainers import Batch, SampleRandom
from trainers.workloads.vision.workload import Vision

HERE, HELIOSTAT = Path(__file__).resolve().parent, Path(sys.executable).with_name("heliostat")
KILLED, STEPS, BATCH, EVERY = 60, 80, 64, 10
PARTS = ("a new process", "its first step", "steps done again")


def begin_step(events: Path, step: int) -> None:
    """Record that this process begins a step; the first to begin step KILLED dies."""
    with events.open("a") as file:
        # The kernel counts the time of a process's creation from the start of the machine.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        made = ticks / os.sysconf("SC_CLK_TCK")
        file.write(f"{os.getpid()} {made} {time.clock_gettime(time.CLOCK_BOOTTIME)} {step}\n")
    if step == KILLED:
        with suppress(FileExistsError), events.with_suffix(".killed").open("x") as file:
            file.write(str(os.getpid()))
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)


class Watched(Vision):
    """The digits, with every step recorded."""

    class Data(Vision.Data):
        events: str = ""

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        begin_step(Path(self.data.events), int(random.positions[0]) // BATCH)
        return super().augment(batch, random)


def heliostat(workers: int, folder: Path, events: Path) -> None:
    fields: dict[str, Any] = {
        "data.events": events,
        "model.width": 16,
        "train.steps": STEPS,
        "train.global_batch": BATCH,
        "checkpoint.every_steps": EVERY,
        "scale.workers": workers,
    }
    options = [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]
    _run([str(HELIOSTAT), "train", "recovery:Watched", *options], folder)


def tutorial(workers: int, folder: Path, events: Path) -> None:
    command = [sys.executable, __file__, "--workers", str(workers), "--tutorial", str(events)]
    _run(command, folder)


def _run(command: list[str], folder: Path) -> None:
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "RAY_TMPDIR": str(folder.parent)}
    environment.pop("RAY_ADDRESS", None)
    start = partial(subprocess.run, cwd=folder, env=environment, capture_output=True, text=True)
    done = start(command)
    start([str(HELIOSTAT), "session", "--end"])
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def recovery(events: Path) -> tuple[dict[str, float], int]:
    """The seconds of each part, and the number of steps done twice."""
    lines = [line.split() for line in events.read_text().splitlines()]
    dead = events.with_suffix(".killed").read_text()
    killed_s = next(
        float(now) for pid, _, now, step in lines if pid == dead and int(step) == KILLED
    )
    new = next(pid for pid, made, *_ in lines if float(made) > killed_s)
    after = [(float(made), float(now), int(step)) for pid, made, now, step in lines if pid == new]
    made_s, begun_s, first = after[0]
    new_s = next(now for _, now, step in after if step == KILLED)
    times = (made_s - killed_s, begun_s - made_s, new_s - begun_s)
    return dict(zip(PARTS, times, strict=True)), KILLED - first


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tutorial", type=Path, metavar="EVENTS", help=argparse.SUPPRESS)
    args = parse(parser)
    if args.tutorial:
        guide.train(
            partial(begin_step, args.tutorial),
            Path.cwd(),
            workers=args.workers,
            steps=STEPS,
            batch=BATCH,
        )
        return
    parts: dict[str, list[dict[str, float]]] = defaultdict(list)
    again: dict[str, list[float]] = defaultdict(list)

    def contender(name: str, run: Any) -> float:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "work"
            folder.mkdir()
            events = folder / "events"
            run(args.workers, folder, events)
            times, twice = recovery(events)
        parts[name].append(times)
        again[name].append(twice)
        return sum(times.values())

    contenders = {"Heliostat": heliostat, "Ray's guide": tutorial}
    measured = compete({k: partial(contender, k, v) for k, v in contenders.items()}, args.rounds)
    show("kill -9 to the next new step", measured, "s", 1.0)
    print(f"\n{'seconds until':<24}" + "".join(f"{name:>16}" for name in parts))
    for part in PARTS:
        medians = (statistics.median(run[part] for run in runs) for runs in parts.values())
        print(f"{part:<24}" + "".join(f"{value:>16.2f}" for value in medians))
    print(f"{'steps done twice':<24}" + "".join(f"{max(again[name]):>16.0f}" for name in parts))
    results = rows("kill to new step", "Heliostat", measured)
    interval = {
        "Heliostat": again["Heliostat"],
        "checkpoint interval": [float(EVERY)] * args.rounds,
    }
    finish("recovery", results + rows("steps done twice", "Heliostat", interval))


if __name__ == "__main__":
    main()
