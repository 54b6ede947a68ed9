"""A sweep from its spec to its end: folder, tracking, budget, Ray Tune, results."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.base.config import apply_overrides, write_yaml
from cluster.base.errors import SpecError
from trainers.data.dataset import prepare_dataset
from trainers.run_folder import (
    SPEC,
    find_run_folder,
    locked,
    read_spec,
    require_kind,
    unique_name,
)
from trainers.runs import run
from trainers.spec import resolve
from trainers.tracking import mlflow_run
from trainers.tracking.mlflow_run import DESCRIPTION_TAG
from trainers.tracking.operation_log import now_ms
from trainers.tracking.tracker import wait_until_sent
from tuning.fused import fusion_plan
from tuning.trials.budget import SweepBudget, open_budget, settle
from tuning.trials.leaderboard import Leaderboard, read_leaderboard, with_importances, write_best
from tuning.trials.mlflow_descriptions import sweep_description
from tuning.trials.space import SweepRunSpec, read_sweep_spec
from tuning.trials.trial import Sweep
from tuning.tuner import (
    TrialCallback,
    cluster_capacity,
    create_tuner,
    epochs_per_trial,
    max_concurrent_trials,
    trial_events,
    trial_folder_name,
)

BEST_SPEC_FILE = "best.yaml"

_folder_name = trial_folder_name
"""The name in Tune's state of sweeps that version 0.1.0 began, when all of this was one module."""

logger = logging.getLogger(__name__)


def new_sweep(name: str, overrides: list[str], sweep_name: str | None) -> Sweep:
    """A new sweep of the spec `name`, in a folder of its own."""
    stem, spec = read_sweep_spec(name, overrides)
    data = run.resolved_data(spec)
    spec, workload = resolve(data, SweepRunSpec)
    dataset = prepare_dataset(workload, Path(spec.storage), spec.datasets)
    name = sweep_name or unique_name(f"{stem}-sweep")
    folder = run.claim_folder(Path(spec.storage), name, data, "sweep")
    return Sweep(data, spec.sweep, dataset, folder)


def resumed_sweep(name: str, storage: Path, overrides: Sequence[str] = ()) -> Sweep:
    """An interrupted sweep, to be continued. Only its budget and prices can be changed."""
    folder = find_run_folder(name, storage)
    require_kind(folder, "sweep")
    for assignment in overrides:
        if assignment.partition(".")[0] not in ("budget", "cost"):
            raise SpecError(f"--set {assignment}: cannot change in a sweep that has begun")
    data = apply_overrides(read_spec(folder), overrides)
    spec, workload = resolve(data, SweepRunSpec)
    dataset = prepare_dataset(workload, Path(spec.storage), spec.datasets)
    if overrides:
        run.refuse_secrets(data)
        with locked(folder):
            write_yaml(data, folder / SPEC)
    return Sweep(data, spec.sweep, dataset, folder)


def run_to_end(
    sweep: Sweep, on_trial_event: TrialCallback, log_line: Callable[[str], None] = lambda line: None
) -> tuple[Leaderboard, dict[str, Any]]:
    """Run a sweep, or the rest of it, in the Ray that is connected.

    Ctrl-C ends it early with its state saved. `log_line` gets a line on how trials share devices.
    Returns the leaderboard, and the sweep's data in MLflow (`Tracker.read`, or `unsent`), with
    `account` and `reason` as `trainers.runs.run.run_to_end` returns them. After an error the
    sweep's MLflow run is ended too, and nothing that fails then hides the error.
    """
    spec, _ = resolve(sweep.spec_data, SweepRunSpec)
    tracker = mlflow_run.start_tracking(sweep.folder, spec, sweep.spec_data, kind="sweep")
    end = _SweepEnd(sweep, tracker)
    with (
        _finally(end.finish),
        _finally(lambda error: end.record_results()),
        open_budget(sweep, spec, tracker, epochs_per_trial(sweep, spec)) as budget,
        _finally(lambda error: end.settle(budget)),
        trial_events(sweep, on_trial_event),
        _fused_slots(sweep, spec, tracker, log_line) as slots,
    ):
        create_tuner(sweep, spec, tracker, slots).fit()
    board = end.track_importances()
    return board, {**mlflow_run.end_tracking(tracker, sweep.key), **end.summary}


@contextlib.contextmanager
def _finally(action: Callable[[BaseException | None], None]) -> Iterator[None]:
    """Call `action` at the end, with the error if there is one.

    Unlike `finally`, an error of `action` itself is only logged after an error of the body, so
    that the user sees the first one.
    """
    try:
        yield
    except BaseException as error:
        try:
            action(error)
        except Exception:
            logger.exception("after %s, ending the sweep failed too", type(error).__name__)
        raise
    action(None)


class _SweepEnd:
    """Records the end of a sweep: in its folder and in MLflow."""

    def __init__(self, sweep: Sweep, tracker: Any) -> None:
        self._sweep, self._tracker = sweep, tracker
        self._status = "KILLED"
        self._tags: dict[str, str] = {}
        self._board: Leaderboard | None = None
        self.summary: dict[str, Any] = {}
        """`account`: lines on the costs. `reason`: the limit of the budget that was reached."""

    def settle(self, budget: SweepBudget) -> None:
        """Charge the rest to the budget."""
        lines, self._tags = settle(self._sweep, budget, self._tracker)
        self.summary = {"account": lines, "reason": budget.reason}

    def record_results(self) -> None:
        """Read the leaderboard, and write the best trial's spec."""
        key, spec = self._sweep.key, self._sweep.spec
        board = self._board = read_leaderboard(self._sweep)
        finished = len(board.ended) == spec.total_trials
        if board.best is not None:
            best_spec = self._sweep.folder / BEST_SPEC_FILE
            write_best(self._sweep, board.best, best_spec)
            self._tracker.log_artifact.remote(key, str(best_spec))
            if finished:
                best = (f"best/{spec.metric}", board.best.value, 0, now_ms())
                self._tracker.log.remote(key, [best], 0)
        if board.pareto_trials:
            numbers = [f"{number:04d}" for number in board.pareto_trials]
            self._tags["heliostat.pareto_front"] = ", ".join(numbers)
        self._tags[DESCRIPTION_TAG] = self._description(board)
        self._status = "FINISHED" if finished else "KILLED"

    def finish(self, error: BaseException | None) -> None:
        """End the sweep's MLflow run."""
        tags = self._tags
        if self._status != "FINISHED":
            reason = self.summary.get("reason") or (str(error) if error else "")
            tags = {**tags, "heliostat.reason": reason or "stopped"}
        self._tracker.finish.remote(self._sweep.key, self._status, tags)
        if error is not None:
            wait_until_sent(self._tracker, timeout_s=10)

    def track_importances(self) -> Leaderboard:
        """Add the importances, which take minutes for 10,000 trials, to the ended MLflow run."""
        assert self._board is not None
        try:
            self._board = with_importances(self._sweep, self._board)
        except Exception:
            logger.exception("the importances of the parameters could not be computed")
        if self._board.importances:
            tags = {DESCRIPTION_TAG: self._description(self._board)}
            self._tracker.set_tags.remote(self._sweep.key, tags)
        return self._board

    def _description(self, board: Leaderboard) -> str:
        return sweep_description(self._sweep, board, self.summary.get("account", {}))


@contextlib.contextmanager
def _fused_slots(
    sweep: Sweep, spec: SweepRunSpec, tracker: Any, log_line: Callable[[str], None]
) -> Iterator[int]:
    """The engines of a fused sweep. Yields the number of their slots, 0 if it is not fused."""
    import ray

    from tuning.fused.tune_adapter import start_engines, trials_in_slots
    from tuning.fused.tune_internals import ended_trials_forgotten

    engines: list[Any] = []
    try:
        capacity = cluster_capacity(spec)
        plan = fusion_plan.load_plan(sweep) or fusion_plan.plan_from_spec(sweep)
        if plan is None:
            engines += start_engines(sweep, tracker, 1)
            planned = engines[0].plan.remote(capacity)
            if ray.get(engines[0].compiles.remote()):  # the others start in the meantime
                engines += start_engines(sweep, tracker, capacity - 1)
            plan = ray.get(planned)
        plan.save(sweep)
        concurrency = min(
            sweep.spec.total_trials, sweep.spec.concurrency or sweep.spec.total_trials
        )
        needed = min(math.ceil(concurrency / plan.slots) if plan.slots else 0, capacity)
        while len(engines) > needed:
            ray.kill(engines.pop())
        engines += start_engines(sweep, tracker, needed - len(engines))
        if not engines:
            unfused = f"{max_concurrent_trials(spec)} at a time, each in a process"
            log_line(f"{plan.line}; {unfused}" if plan.line else unfused)
            with ended_trials_forgotten():
                yield 0
            return
        log_line(plan.line)
        for engine in engines:
            engine.prepare.remote()
        slots = min(plan.slots * len(engines), concurrency)
        with trials_in_slots(engines, slots):
            yield slots
    finally:
        for engine in engines:
            ray.kill(engine)


def verify_fused_trials(sweep: Sweep, board: Leaderboard) -> Iterator[str]:
    """Train three fused trials once more, each alone; yields a line on each."""
    import ray

    from tuning.fused import verify

    if not fusion_plan.planned_slots(sweep):
        yield "nothing to verify: no trial was fused"
        return
    resources = sweep.spec.resources
    train_alone = ray.remote(num_cpus=resources.cpu, num_gpus=resources.gpu)(
        verify.measure_deviation
    )
    trials = verify.trials_to_verify(board)
    for deviation in [train_alone.remote(sweep, trial) for trial in trials]:
        yield str(ray.get(deviation))
