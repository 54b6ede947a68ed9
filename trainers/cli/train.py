"""The verbs of training: `train` and `ui`, and those of `trainers/*_cli.py`."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trainers.cli.data
import trainers.cli.plan
import trainers.cli.track
from cluster.cli.lifecycle import open_cluster_ui
from cluster.cli.options import Subparsers, run_options
from trainers.cli.plan import as_job

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from trainers.outcome import Outcome
    from trainers.runs.run import Run
    from trainers.tracking.operation_log import MetricPoint


def add_verbs(verbs: Subparsers) -> None:
    train = verbs.add_parser(
        "train",
        parents=[run_options()],
        help="train one model",
        description="Train the model that SPEC describes with Ray Train, tracked in MLflow.",
    )
    train.add_argument("spec", nargs="?", help="a file, a shipped spec's name, or module:Class")
    train.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted")
    train.add_argument(
        "--from",
        dest="source",
        metavar="RUN",
        help="start from the newest checkpoint of another run or trial",
    )
    train.set_defaults(command=train_command, plan=as_job)
    trainers.cli.data.add_verbs(verbs)
    trainers.cli.plan.add_verbs(verbs)
    ui = verbs.add_parser("ui", help="open MLflow's pages on this folder's runs, or a cluster's")
    ui.add_argument(
        "--cluster", type=Path, metavar="FILE", help="open Ray's and MLflow's pages of its head"
    )
    ui.add_argument("--uri", help="MLflow tracking URI; MLFLOW_TRACKING_URI, else ./mlflow.db")
    ui.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default 5000)")
    ui.set_defaults(command=ui_command)
    trainers.cli.track.add_verbs(verbs)


def train_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import SpecError
    from trainers.runs import run

    if args.resume and (args.name or args.source):
        raise SpecError("--resume: a run keeps its name and its own checkpoints")
    if args.or_resume and not args.name:
        raise SpecError("--or-resume: needs --name, to know what to go on with")
    if storage := run.find_started(args):
        unfinished = run.resumed_run(args.name, storage, [])
    elif args.resume:
        unfinished = run.resumed_run(args.resume, run.storage_for_spec(args.spec), args.set)
    elif args.spec:
        unfinished = run.new_run(args.spec, args.set, args.name, args.source)
    else:
        raise SpecError("train: needs a spec, or --resume RUN")
    folder, spec = unfinished.folder, unfinished.spec
    start = time.monotonic()
    with run.run_session(folder, spec, args.address, args.verbose) as (console, stop):
        console.print(
            f"[bold]{unfinished.key}[/]: {spec.workload}, {unfinished.samples:,} samples, "
            f"{unfinished.total_steps:,} steps of {spec.train.global_batch}, "
            f"workers: {spec.scale.workers}"
        )
        with ProgressBar(console, unfinished.total_steps) as progress:
            outcome, tracked = run.run_to_end(unfinished, progress.on_progress, stop)
        _show_outcome(console, unfinished, outcome, tracked, time.monotonic() - start)
    return 0 if outcome.complete else 130


class ProgressBar:
    """Steps, samples/s, loss and time left; a line per evaluation where there is no terminal."""

    def __init__(self, console: "Console", total_steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        from cluster.base.terminal import JobProgress

        self._console = console
        self._newest: dict[str, float] = {}
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            "steps",
            "{task.description}",
            TimeRemainingColumn(compact=True),
            "left",
            console=console,
            disable=not console.is_terminal,
            redirect_stdout=False,  # what others print goes to the log
            redirect_stderr=False,
        )
        self._total_steps = total_steps
        self._pulse = JobProgress(console)
        self._task = self._bar.add_task("starting", total=total_steps)

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_progress(self, step: int, rows: "list[MetricPoint]", lines: list[str]) -> None:
        for line in lines:
            self._console.print(line, highlight=False)
        evaluated = ""
        for name, value, row_step, _ in rows:
            self._newest[name] = value
            if name.startswith(("val/", "test/")):
                evaluated = f"step {row_step}/{self._total_steps}"
        if step:
            self._bar.update(self._task, completed=step, description=self._summary())
        if evaluated and not self._console.is_terminal:
            self._console.print(f"{evaluated}  {self._summary()}")
        elif step:
            self._pulse.report(lambda: f"step {step}/{self._total_steps}  {self._summary()}")

    def _summary(self) -> str:
        shown = {"perf/samples_per_s": "{:,.0f} samples/s", "train/loss": "loss {:.4f}"}
        parts = [form.format(self._newest[k]) for k, form in shown.items() if k in self._newest]
        # A bar shares its line with this, and the table at the end has the rest.
        scores = "val/" if self._console.is_terminal else ("val/", "test/")
        parts += [f"{k} {v:.4f}" for k, v in self._newest.items() if k.startswith(scores)]
        return "  ".join(parts)


def _show_outcome(
    console: "Console", run: "Run", outcome: "Outcome", tracked: "dict[str, Any]", wall_s: float
) -> None:
    """The end of a run: its metrics as MLflow has them, and where everything is."""
    from rich.table import Table

    from cluster.connection.ray_connection import submission_metadata
    from trainers.checkpoints.checkpoints import Checkpoints
    from trainers.run_folder import CHECKPOINTS, TRACKING, display_path

    metrics = tracked.get("metrics", outcome.metrics)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in sorted(metrics, key=lambda name: (not name.startswith("test/"), name)):
        if name.startswith(("test/", "val/", "train/loss")):
            table.add_row(name, f"[bold]{metrics[name]:.4f}[/]")
    if outcome.samples_per_s:
        table.add_row("samples/s", f"{outcome.samples_per_s:,.0f}")
        table.add_row("step", _step_time(metrics))
    table.add_row("wall time", f"{wall_s:.0f} s")
    if "forecast" in tracked:
        table.add_row("forecast", tracked["forecast"])
    for name, text in tracked.get("account", {}).items():
        table.add_row(name, text)
    newest = Checkpoints(run.folder / CHECKPOINTS).latest()
    table.add_row("checkpoint", display_path(newest) if newest else "none")
    if "unsent" in tracked:
        table.add_row(
            "tracking", f"[yellow]{tracked['unsent']}; kept in {run.folder / TRACKING}[/]"
        )
    else:
        table.add_row("model", tracked["model_uri"] or "none")
        table.add_row("MLflow run", f"{tracked['run_id']} (heliostat ui)")
    console.print(table)
    if not outcome.complete:
        reason = tracked.get("reason")
        more = f" --set {reason.partition(' ')[0]}=MORE" if reason and "reached" in reason else ""
        console.print(
            f"{f'{reason}; ' if reason else ''}stopped after step {outcome.step} of "
            f"{outcome.total_steps}, saved; go on with\n  heliostat "
            f"{'submit ' if submission_metadata() else ''}train --resume {display_path(run.folder)}{more}",
            highlight=False,
        )


def _step_time(metrics: "Mapping[str, float]") -> str:
    """A step's time and what it was made of, by the newest report; then MFU and goodput."""
    if "perf/step_s" not in metrics:
        return ""
    shares = [
        f"{part} {share:.0%}"
        for part in ("data", "compute", "communication", "checkpoint", "other")
        if (share := metrics.get(f"perf/{part}_share", 0.0)) >= 0.005
    ]
    text = f"{metrics['perf/step_s'] * 1e3:.3g} ms ({', '.join(shares)})"
    text += f"; MFU {metrics['perf/mfu']:.1%}" if "perf/mfu" in metrics else ""
    return text + f"; goodput {metrics['perf/goodput']:.0%}"


def ui_command(args: argparse.Namespace) -> int:  # noqa: RET503
    import os
    import sys

    from trainers.tracking.mlflow_store import create_database
    from trainers.tracking.tracker import default_tracking_uri

    if args.cluster:
        return open_cluster_ui(args.cluster, args.port)
    uri = args.uri or default_tracking_uri()
    if uri.startswith(("http://", "https://")):
        print(f"MLflow's pages are at {uri}")
        return 0
    create_database(uri)
    print(f"MLflow on {uri}: http://127.0.0.1:{args.port}  (Ctrl-C ends it)", flush=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    server = ["mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command = [sys.executable, "-m", *server, "--port", str(args.port), "--workers", "1"]
    os.execv(sys.executable, command)  # so that a signal to us is one to the server
