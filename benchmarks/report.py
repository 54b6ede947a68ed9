"""The time to write a report, its size, and the time until a browser has opened it.

    python benchmarks/report.py [--trials 1000] [--points 100] [--rounds 5] [--tiny]

A sweep of made-up numbers is written to a folder, with our own journal, operation log and ledger,
and headless Chromium opens its page from the disk. The page is open when its curves, the first
part under the summary, are drawn. The time is the page's own clock, since its navigation began.
"""

import json
import math
import random
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from cluster.cost.ledger import Ledger, LedgerEntry
from trainers.reports import page
from trainers.run_folder import TRACKING, create_run_folder
from trainers.runs.run import resolved_data
from trainers.tracking.mlflow_run import tracked_run
from trainers.tracking.operation_log import OperationLog
from trainers.tracking.tracker import TrackedRun
from tuning.reports.sweep_report import sweep_page
from tuning.spaces.space import SweepRunSpec, read_sweep_spec
from tuning.trials.journal import Journal
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, LAST_RESULT_FILE, Sweep

BEGAN = 1_790_000_000
"""Unix time at which made-up sweeps begin."""
EVERY_S = 2.0
"""Seconds between two points of a trial."""
STEPS = 20
"""Steps between two points; an epoch of the digits has 20."""


def made_up(storage: Path, name: str, trials: int, points: int, *overrides: str) -> Sweep:
    """Write a sweep of the digits to `storage`, with made-up numbers.

    Two trials run at a time; every third one is stopped half-way, and the last one has failed.
    """
    overrides = (f"storage={storage}", f"sweep.trials={trials}", *overrides)
    _, spec = read_sweep_spec("digits", [*overrides, "cost.usd_per_h=0.9"])
    data = resolved_data(spec)
    folder = create_run_folder(storage, name, data, "sweep")
    sweep = Sweep(data, SweepRunSpec.model_validate(data).sweep, storage, folder)
    log, journal = OperationLog(folder / TRACKING), Journal(folder / JOURNAL_FILE)
    ledger, dice = Ledger(folder / "ledger.jsonl"), random.Random(0)
    _start(log, tracked_run(name, data, kind="sweep"), BEGAN)
    free, cost = [float(BEGAN)] * 2, 0.0
    for number in range(trials):
        lane = free.index(min(free))
        last = number == trials - 1
        done = points // 2 if number % 3 == 1 or last else points
        begin, end = free[lane] + 1, free[lane] + 1 + EVERY_S * done
        free[lane] = end
        parameters = _parameters(sweep, dice)
        journal.record_suggestion(number, parameters)
        _trial(sweep, log, number, parameters, begin, done, dice)
        ledger.append([_used(sweep.trial_key(number), begin, end)])
        own = (end - begin) / 3600 * 0.45
        cost += own
        _costs(log, sweep.trial_key(number), own, end, round(end - begin))
        _end(sweep, log, journal, number, done == points, last, end)
    _costs(log, name, cost, max(free), round(max(free)) - BEGAN)
    tags = {"heliostat.price": "$0.9/h (cost.usd_per_h)", "heliostat.energy": "made up"}
    _say(log, "finish", name, max(free), status="FINISHED", tags=tags)
    ledger.close()
    log.close()
    return sweep


def _parameters(sweep: Sweep, dice: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, space in sweep.spec.parameters.items():
        if space.choice is not None:
            found[path] = dice.choice(space.choice)
            continue
        low, high = space.bounds or (0, 1)
        logs = math.exp(dice.uniform(math.log(low), math.log(high))) if low > 0 else 0.0
        found[path] = logs if "log" in space.kind else dice.uniform(low, high)
    return found


def _trial(
    sweep: Sweep,
    log: OperationLog,
    number: int,
    parameters: dict[str, Any],
    begin: float,
    points: int,
    dice: random.Random,
) -> None:
    key = sweep.trial_key(number)
    run = tracked_run(key, sweep.trial_spec_data(parameters), sweep.key, "trial")
    _start(log, run, begin)
    worth = abs(math.log(parameters["optimizer.lr"] / 6e-3)) + 0.2 * dice.random()
    rows, found = [], {}
    for point in range(1, points + 1):
        loss = 2.3 * math.exp(-point / 8) + 0.1 + 0.2 * worth + 0.02 * dice.random()
        found = {"val/loss": loss, "val/accuracy": math.exp(-loss / 4)}
        shares = {"data": 0.05, "compute": 0.8, "other": 0.15}
        perf = {"perf/step_s": 0.02, **{f"perf/{k}_s": v * 0.02 for k, v in shares.items()}}
        perf |= {f"perf/{k}_share": v for k, v in shares.items()}
        told = found | {"train/loss": loss * 0.9} | (perf if point % 10 == 0 else {})
        at = round(1e3 * (begin + EVERY_S * point))
        rows += [(name, value, STEPS * point, at) for name, value in told.items()]
    log.append({"do": "log", "run": key, "rows": rows})
    folder = sweep.trial_folder(number)
    folder.mkdir(parents=True)
    result = {**found, "step": STEPS * points, "epoch": float(points), "complete": False}
    (folder / LAST_RESULT_FILE).write_text(json.dumps({**result, "device_s": EVERY_S * points}))


def _end(
    sweep: Sweep,
    log: OperationLog,
    journal: Journal,
    number: int,
    complete: bool,
    failed: bool,
    end: float,
) -> None:
    folder = sweep.trial_folder(number)
    last = json.loads((folder / LAST_RESULT_FILE).read_text())
    (folder / LAST_RESULT_FILE).write_text(json.dumps({**last, "complete": complete}))
    value = None if failed else last[sweep.spec.metric]
    journal.record_end(number, value, last["step"], complete)
    (folder / (FAILED_FILE if failed else ENDED_FILE)).write_text("made up")
    tags = {} if complete or failed else {"heliostat.stopped": "asha"}
    status = "FAILED" if failed else "FINISHED"
    _say(log, "finish", sweep.trial_key(number), end, status=status, tags=tags)


def _start(log: OperationLog, run: TrackedRun, at: float) -> None:
    told = {"key": run.key, "params": run.params, "tags": run.tags, "parent": run.parent}
    log.append({"do": "start", "id": uuid.uuid4().hex, **told, "at": round(1e3 * at)})


def _say(log: OperationLog, what: str, run: str, at: float, **more: Any) -> None:
    log.append({"do": what, "run": run, "at": round(1e3 * at), **more})


def _costs(log: OperationLog, run: str, usd: float, at: float, step: int) -> None:
    found = {"cost_usd": usd, "energy_j": 1e5 * usd, "kg_co2e": 1e-3 * usd}
    rows = [(name, value, step, round(1e3 * at)) for name, value in found.items()]
    log.append({"do": "log", "run": run, "rows": rows})


def _used(run: str, begin: float, end: float) -> LedgerEntry:
    usage = {"device": "vm/cpu/1", "covers": "cpu", "seconds": end - begin}
    usage |= {"unknown_s": 0.0, "low_j": 1.0, "high_j": 3.0, "by_method": {"made up": 2.0}}
    name = f"{uuid.uuid4().hex}/vm/cpu/1/cpu"
    return LedgerEntry(name, run, "energy", begin, end, end - begin, "vm", "vm/cpu/1", None, usage)


def main() -> None:
    from browser import browser
    from contest import as_json, options, parse

    parser = options(__doc__, rounds=5)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--points", type=int, default=100, help="of each metric of a trial")
    args = parse(parser)
    if args.tiny:
        args.trials, args.points = 6, 4
    with tempfile.TemporaryDirectory() as folder:
        sweep = made_up(Path(folder), "wide", args.trials, args.points)
        start = time.monotonic()
        made = sweep_page(sweep.folder)
        read_s = time.monotonic() - start
        path = sweep.folder / "wide.html"
        path.write_text(page.render_html(made))
        size_bytes = path.stat().st_size
        size = f"{size_bytes / 1e6:.2f} MB"
        print(
            f"{args.trials} trials x {args.points} points: {size}, read in {read_s:.1f} s",
            flush=True,
        )
        opened_s, drawn_s = [], []
        with browser() as tab:
            tab.resize(1280, 900)
            for _ in range(args.rounds):
                tab.open(path)
                first = made.charts[0].name
                opened_s.append(tab.run(OPENED % json.dumps(first)) / 1e3)
                tab.run("report.drawAll()")
                drawn_s.append(tab.run("performance.now()") / 1e3)
            assert not tab.complaints, tab.complaints
        print(
            f"open in {_spread(opened_s)}; all {len(made.charts)} charts in {_spread(drawn_s)}",
            flush=True,
        )
        start = time.monotonic()
        page.write_report(made, sweep.folder / "report")
        written_s = time.monotonic() - start
        print(f"written again, with {len(made.charts)} PNG files, in {written_s:.1f} s")
    row = {"trials": args.trials, "points": args.points, "size_bytes": size_bytes, "read_s": read_s}
    row |= {"opened_s": opened_s, "drawn_s": drawn_s, "written_with_png_s": written_s}
    as_json("report", [row])


OPENED = """new Promise((ok) => {
  const look = () => {
    const [mark] = performance.getEntriesByName(%s);
    mark ? ok(mark.startTime) : requestAnimationFrame(look);
  };
  look();
})"""
"""JavaScript for the time at which a chart was drawn, in ms since the navigation began."""


def _spread(seconds: list[float]) -> str:
    middle = statistics.median(seconds)
    return f"{middle:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


if __name__ == "__main__":
    main()
