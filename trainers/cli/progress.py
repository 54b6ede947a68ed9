"""Progress bars in a terminal, and lines of progress where there is none."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from trainers.tracking.operation_log import MetricPoint


def bar_of(console: "Console", unit: str) -> "Progress":
    """A progress bar that counts `unit`; hidden where the console is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        unit,
        "{task.description}",
        TimeRemainingColumn(compact=True),
        "left",
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=False,  # the output of libraries goes to the log
        redirect_stderr=False,
    )


class TrainingProgress:
    """Steps, samples/s, loss and time left; a line per evaluation where there is no terminal."""

    def __init__(self, console: "Console", total_steps: int) -> None:
        from cluster.base.terminal import JobProgress

        self._console = console
        self._latest: dict[str, float] = {}
        self._total_steps = total_steps
        self._bar = bar_of(console, "steps")
        self._job_progress = JobProgress(console)
        self._task = self._bar.add_task("starting", total=total_steps)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_progress(self, step: int, points: "list[MetricPoint]", lines: list[str]) -> None:
        """Show the progress of a run; a `trainers.runs.ray_train.ProgressCallback`."""
        for line in lines:
            self._console.print(line, highlight=False)
        evaluated = ""
        for name, value, point_step, _ in points:
            self._latest[name] = value
            if name.startswith(("val/", "test/")):
                evaluated = f"step {point_step}/{self._total_steps}"
        if step:
            self._bar.update(self._task, completed=step, description=self._summary())
        if evaluated and not self._console.is_terminal:
            self._console.print(f"{evaluated}  {self._summary()}")
        elif step:
            self._job_progress.report(lambda: f"step {step}/{self._total_steps}  {self._summary()}")

    def _summary(self) -> str:
        shown = {"perf/samples_per_s": "{:,.0f} samples/s", "train/loss": "loss {:.4f}"}
        parts = [form.format(self._latest[k]) for k, form in shown.items() if k in self._latest]
        # In a terminal, the bar takes part of the line, and the table at the end shows the rest.
        scores = "val/" if self._console.is_terminal else ("val/", "test/")
        parts += [f"{k} {v:.4f}" for k, v in self._latest.items() if k.startswith(scores)]
        return "  ".join(parts)


def format_step_time(metrics: Mapping[str, float]) -> str:
    """A step's time and its parts, by the newest report; then MFU and goodput."""
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
