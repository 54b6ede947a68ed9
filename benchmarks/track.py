"""The cost of tracking for a training loop, the rate into MLflow, and the losses after kills.

    python benchmarks/track.py [--seconds 20] [--rounds 3] [--stores sqlite,server,postgres]
        [--contenders NAME ...] [--tiny]

The contenders are: ours (the loop's reporter, and the tracker in Ray); MLflow's client with full
batches and no other work, which shows the limit of the store; `mlflow.log_metrics`; MLflow's
asynchronous logging, without and with its buffer; and Ray's `MLflowLoggerCallback`. Each is a
process of its own that does steps of ten metrics as fast as its calls return, at most 500 steps
per second of `--seconds`. After that time it may drain for as long again. Postgres is that of
Debian's packages, and is left out where it is not installed.

In the part with kills, there is a step every 10 ms. The server, with one worker, is killed after a
third of the time, and started again a sixth later. After two thirds the writer is killed. Its
successor continues at the last multiple of 100 steps, as from a checkpoint. Before a checkpoint,
ours waits until everything is on the disk; this wait is not in the time of a step. A metric is lost
if its call had returned, and MLflow does not have it when the writer has ended or has run for three
times the seconds. A metric is duplicated if MLflow has it more than once.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from contest import as_json, leave_out, options, parse

NAMES = [f"group/metric_{number}" for number in range(10)]
STEPS_PER_S, CHECKPOINT = 500, 100
Calls = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]
"""Two functions that a loop calls: with the metrics of each step, and before each checkpoint."""


def nothing() -> None:
    """Stands for the call before a checkpoint, which only ours needs."""


@contextlib.contextmanager
def ours(uri: str, folder: Path) -> Iterator[Calls]:
    import ray

    from trainers.tracking.reporter import TrackerReporter
    from trainers.tracking.tracker import TrackedRun, start_tracker, wait_until_sent

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    tracker = start_tracker(folder / "track", uri, "benchmark", "tracker")
    tracker.start.remote(TrackedRun("run", {}))
    reporter = TrackerReporter(tracker, "run")

    def log(metrics: dict[str, float], step: int) -> None:
        reporter.log_metrics(metrics, step)
        reporter.on_step_end(step)

    yield log, reporter.flush
    reporter.flush()
    tracker.finish.remote("run", "FINISHED")
    wait_until_sent(tracker, timeout_s=1e6)
    ray.get(tracker.close.remote())


@contextlib.contextmanager
def by_mlflow(uri: str, folder: Path, synchronous: bool) -> Iterator[Calls]:
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("benchmark")
    known = folder / "run_id"
    with mlflow.start_run(run_id=known.read_text() if known.exists() else None) as run:
        known.write_text(run.info.run_id)

        def log(metrics: dict[str, float], step: int) -> None:
            if synchronous:
                mlflow.log_metrics(metrics, step)
            else:
                for name, value in metrics.items():
                    mlflow.log_metric(name, value, step, synchronous=False)

        yield log, nothing
        mlflow.flush_async_logging()


@contextlib.contextmanager
def by_batches(uri: str, folder: Path) -> Iterator[Calls]:
    """The rate of one client that sends full batches in a loop and keeps no file on disk."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("benchmark")
    found = experiment.experiment_id if experiment else client.create_experiment("benchmark")
    run_id = client.create_run(found).info.run_id
    waiting: list[Metric] = []

    def send() -> None:
        client.log_batch(run_id, metrics=waiting)
        waiting.clear()

    def log(metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1e3)
        waiting.extend(Metric(name, value, now, step) for name, value in metrics.items())
        if len(waiting) >= 1000:
            send()

    yield log, nothing
    send()


class Trial(SimpleNamespace):
    """The attributes of a trial that Ray's callback reads; it uses trials as keys by identity."""

    __hash__ = object.__hash__


@contextlib.contextmanager
def by_ray(uri: str, folder: Path) -> Iterator[Calls]:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    callback = MLflowLoggerCallback(uri, experiment_name="benchmark")
    trial = Trial(config={}, local_path=str(folder))
    callback.setup()
    callback.log_trial_start(trial)

    def log(metrics: dict[str, float], step: int) -> None:
        callback.log_trial_result(step, trial, {**metrics, "training_iteration": step})

    yield log, nothing
    callback.log_trial_end(trial)


BUFFER = {"MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1"}
CONTENDERS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = {
    "Heliostat": (ours, {}, {}),
    "client, batches of 1,000": (by_batches, {}, {}),
    "mlflow.log_metrics": (by_mlflow, {"synchronous": True}, {}),
    "asynchronous": (by_mlflow, {"synchronous": False}, {}),
    "asynchronous, buffer of 1 s": (by_mlflow, {"synchronous": False}, BUFFER),
    "Ray's callback": (by_ray, {}, {}),
}


def write(name: str, uri: str, folder: Path, seconds: float, pause_s: float) -> None:
    """The process of a contender. Steps done go to `done`, measurements to `measured.json`."""
    begin, arguments, _ = CONTENDERS[name]
    done = folder / "done"
    first = len(done.read_bytes().split()) // CHECKPOINT * CHECKPOINT if done.exists() else 0
    spent_s, longest_s = 0.0, 0.0
    with begin(uri, folder, **arguments) as (log, save), done.open("ab", buffering=0) as record:
        log({"connected": 1.0}, first)
        begun = time.perf_counter()
        for step in range(first + 1, int(seconds * STEPS_PER_S)):
            metrics = dict.fromkeys(NAMES, step / 7)
            start = time.perf_counter()
            log(metrics, step)
            took_s = time.perf_counter() - start
            spent_s, longest_s = spent_s + took_s, max(longest_s, took_s)
            if step % CHECKPOINT == 0:
                save()
            record.write(b"%d\n" % step)
            if time.perf_counter() - begun > seconds:
                break
            time.sleep(pause_s)
        count = (step - first) * len(NAMES)
        figures = {"us": spent_s / count * 1e6, "longest_s": longest_s, "begun": time.time()}
        figures["begun"] -= time.perf_counter() - begun
        (folder / "measured.json").write_text(json.dumps(figures))
    (folder / "ended").write_text(str(time.time()))


def start(name: str, uri: str, folder: Path, seconds: float, pause_s: float = 0.0) -> Any:
    command = [sys.executable, __file__, "--write", name, uri, str(folder)]
    environment = {**os.environ, **CONTENDERS[name][2]}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [*command, str(seconds), str(pause_s)], stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip


def kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stored(database: str) -> tuple[int, set[tuple[str, int]]]:
    """The number of our metrics in a database, and the set of them as (name, step)."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(database)
    with engine.connect() as connection:
        query = sqlalchemy.text("SELECT key, step FROM metrics WHERE key LIKE 'group/%'")
        rows = [(key, step) for key, step in connection.execute(query)]
    engine.dispose()
    return len(rows), set(rows)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def serve(database: str, port: int, folder: Path) -> Any:
    """Start an MLflow server of one worker; returns when it answers."""
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "files")]
    server = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return server
        except OSError:
            time.sleep(0.1)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A new Postgres of Debian's packages; it refuses to run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))[-1].parent
    user, port = ("postgres" if os.getuid() == 0 else None), free_port()
    folder.chmod(0o777)
    data = folder / "postgres"
    options = ["-D", str(data), "-U", "me", "-A", "trust"]
    subprocess.run([programs / "initdb", *options], user=user, check=True, capture_output=True)
    control = [str(programs / "pg_ctl"), "-D", str(data), "-w"]
    listen = f"-p {port} -k {data} -h 127.0.0.1"
    begin = [*control, "-o", listen, "-l", str(data / "log"), "start"]
    subprocess.run(begin, user=user, check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql://me@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], user=user, check=True)


@contextlib.contextmanager
def store(kind: str) -> Iterator[tuple[str, str, Path]]:
    """A new store: its URI for MLflow, the URI of its database, and a folder."""
    from trainers.tracking.mlflow_store import create_database

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = f"sqlite:///{folder}/mlflow.db"
        if kind == "postgres":
            database = stack.enter_context(postgres(folder))
        create_database(database)
        uri = database
        if kind != "sqlite":
            port = free_port()
            stack.callback(kill, serve(database, port, folder))
            uri = f"http://127.0.0.1:{port}"
        yield uri, database, folder


def calm(name: str, kind: str, seconds: float) -> dict[str, float]:
    """Metrics per second until MLflow has them, and microseconds of the loop per metric."""
    with store(kind) as (uri, database, folder):
        writer = start(name, uri, folder, seconds)
        measured, ended = folder / "measured.json", folder / "ended"
        while not measured.exists() and writer.poll() is None:
            time.sleep(0.05)
        deadline = time.monotonic() + seconds
        while writer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        count, _ = stored(database)
        end_s = float(ended.read_text()) if ended.exists() else time.time()
        kill(writer)
        if not measured.exists():
            raise SystemExit(f"{name} failed:\n{(folder / 'log').read_text()}")
        figures = json.loads(measured.read_text())
        return {"per_s": count / (end_s - figures["begun"]), "us": figures["us"]}


def killed(name: str, seconds: float) -> dict[str, Any]:
    """Numbers of lost and duplicated metrics, with server and writer killed."""
    with tempfile.TemporaryDirectory() as temporary:
        from trainers.tracking.mlflow_store import create_database

        folder, port = Path(temporary), free_port()
        database = f"sqlite:///{folder}/mlflow.db"
        create_database(database)
        uri, server = f"http://127.0.0.1:{port}", serve(database, port, folder)
        writer = start(name, uri, folder, seconds, 0.01)
        while not (folder / "done").exists():
            time.sleep(0.05)
        time.sleep(seconds / 3)
        kill(server)
        time.sleep(seconds / 6)
        server = serve(database, port, folder)
        time.sleep(seconds / 6)
        kill(writer)
        writer = start(name, uri, folder, seconds, 0.01)
        try:
            code = writer.wait(seconds * 3)
        except subprocess.TimeoutExpired:
            code = None
        kill(writer)
        steps = {int(step) for step in (folder / "done").read_text().split()}
        count, unique = stored(database)
        kill(server)
    wanted = {(metric, step) for metric in NAMES for step in steps}
    lost = len(wanted - unique)
    return {"wanted": len(wanted), "lost": lost, "twice": count - len(unique), "code": code}


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--stores", default="sqlite,server,postgres")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--write", nargs=5, help=argparse.SUPPRESS)
    args = parse(parser)
    if args.write:
        name, uri, folder, seconds, pause_s = args.write
        write(name, uri, Path(folder), float(seconds), float(pause_s))
        return
    if args.tiny:
        args.seconds, args.stores = 0.5, "sqlite"
        args.contenders = args.contenders or ["Heliostat", "mlflow.log_metrics"]
    results = []
    kinds = args.stores.split(",")
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and "postgres" in kinds:
        leave_out("postgres", "Postgres is not installed")
        kinds.remove("postgres")
    names = args.contenders or list(CONTENDERS)
    for kind in kinds:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for name in names * args.rounds:
            runs[name].append(calm(name, kind, args.seconds))
        print(f"\n{kind:<30} metrics/s       us per metric", flush=True)
        for name, figures in runs.items():
            row = {key: statistics.median(each[key] for each in figures) for key in figures[0]}
            results.append({"case": kind, "contender": name, **row, "runs": figures})
            print(f"  {name:<28} {row['per_s']:9,.0f} {row['us']:15.1f}", flush=True)
    print(f"\n{'under kills':<30} metrics    lost   twice   exit", flush=True)
    for name in [] if args.tiny else names:
        found = killed(name, args.seconds)
        results.append({"case": "under kills", "contender": name, **found})
        counts = f"{found['wanted']:7,d} {found['lost']:7,d} {found['twice']:7,d}"
        print(f"  {name:<28} {counts}   {found['code']}", flush=True)
    as_json("track", results)


if __name__ == "__main__":
    main()
