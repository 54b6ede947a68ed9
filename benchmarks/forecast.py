"""How well `heliostat plan` forecasts the time of `heliostat train` on this machine.

    python benchmarks/forecast.py [--cases 12] [--seconds 4] [--tiny]

Each case is a size of a model, a global batch and a number of workers. For each size and batch a
plan is made, and then each number of workers is trained to the end. Both use the commands of a
user, in one folder. So the intervals are the printed ones: at first from the shipped error bars,
later more and more from the earlier runs. A case counts as inside if the time from asking for the
workers until they are gone is within the plan's interval. The aims: inside in at least 9 of 10
cases, and a median error of at most 10 %.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from contest import as_json, options, parse


class Size(NamedTuple):
    """A size of a model and a global batch, for which one plan is made."""

    name: str
    spec: str
    changes: dict[str, Any]


SIZES = [
    Size(
        f"digits, width {width}, batch {batch}",
        "digits",
        {"model.width": width, "train.global_batch": batch, "train.steps": steps},
    )
    # Each takes about half a minute on two cores.
    for width, batch, steps in [
        (16, 64, 2000),
        (8, 64, 4000),
        (32, 64, 700),
        (16, 256, 500),
        (24, 128, 600),
        (32, 16, 2000),
    ]
]
TINY = Size("digits, tiny", "digits", {"model.width": 8, "train.steps": 40})
WORKERS = (1, 2)
COLUMNS = ("forecast s", "interval", "actual s", "error", "inside")


def heliostat(folder: Path, *arguments: str) -> None:
    """Run the command as a user does; if it fails, its output is printed."""
    command = [str(Path(sys.executable).with_name("heliostat")), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, forecasts or actual times, in the runs' folder."""
    path = folder / "runs" / "forecasts.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def planned(folder: Path, size: Size, seconds: float) -> tuple[list[str], float]:
    """Make a plan; returns the command-line options of the size, and the seconds of the plan."""
    changes = {"train.epochs": "null", "train.evaluate_every_epochs": 20, **size.changes}
    options = [word for k, value in changes.items() for word in ("--set", f"{k}={value}")]
    began = time.monotonic()
    heliostat(folder, "plan", size.spec, *options, "--seconds", str(seconds))
    return options, time.monotonic() - began


def trained(folder: Path, size: Size, options: list[str], workers: int) -> dict[str, Any]:
    """Train to the end; returns the row of the case."""
    name = f"run-{time.time_ns()}"
    scale = ["--set", f"scale.workers={workers}"]
    heliostat(folder, "train", size.spec, *options, *scale, "--name", name)
    actual = lines(folder, "actual")[-1]
    if actual["run"] != name:
        sys.exit(f"{size.name}: no forecast was found for the run")
    low, middle, high = actual["expected_s"]
    taken = actual["wall_s"]
    return {
        "case": f"{size.name}, workers {workers}",
        "forecast_s": middle,
        "low_s": low,
        "high_s": high,
        "taken_s": taken,
        "error": taken / middle - 1,
        "inside": low <= taken <= high,
    }


def show(row: dict[str, Any]) -> None:
    interval = f"{row['low_s']:.1f} to {row['high_s']:.1f}"
    print(
        f"{row['case']:<40} {row['forecast_s']:>10.1f} {interval:>16} {row['taken_s']:>9.1f} "
        f"{row['error']:>+7.1%} {'yes' if row['inside'] else 'NO':>7}",
        flush=True,
    )


def main() -> None:
    parser = options(__doc__, rounds=1)
    parser.add_argument("--cases", type=int, default=len(SIZES) * len(WORKERS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of steps, for each probe")
    args = parse(parser)
    sizes = SIZES
    if args.tiny:
        args.cases, args.seconds, sizes = 1, 0.5, [TINY]
    rows: list[dict[str, Any]] = []
    plans_s = []
    print(f"{'case':<40} {COLUMNS[0]:>10} {COLUMNS[1]:>16} {COLUMNS[2]:>9} {COLUMNS[3]:>7} inside")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for size in sizes:
            if len(rows) < args.cases:
                words, plan_s = planned(folder, size, args.seconds)
                plans_s.append(plan_s)
            for workers in WORKERS:
                if len(rows) < args.cases:
                    rows.append(trained(folder, size, words, workers))
                    show(rows[-1])
    inside = sum(row["inside"] for row in rows)
    median = statistics.median(abs(row["error"]) for row in rows)
    print(
        f"\ninside {inside} of {len(rows)}; median error {median:.1%}; "
        f"a plan took {statistics.median(plans_s):.0f} s"
    )
    as_json("forecast", rows)


if __name__ == "__main__":
    main()
