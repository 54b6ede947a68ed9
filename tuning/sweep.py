"""A sweep from its spec to its end: folder, tracking, budget, Ray Tune, results."""

import contextlib
import logging
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.base.config import apply_overrides, write_yaml
from trainers.run_folder import (
    SPEC,
    TRIALS,
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
from tuning import earlier
from tuning.failures import MistakeWatch, run_failed_again
from tuning.fused import fusion_plan
from tuning.spaces.space import SweepRunSpec, check_folds, read_sweep_spec
from tuning.sweep_checks import check_metrics, check_overrides, check_trials
from tuning.trial_resources import cluster_capacity, max_concurrent_trials
from tuning.trials.best_spec import write_best
from tuning.trials.budget import SweepBudget, open_budget, settle
from tuning.trials.datasets import prepare_datasets
from tuning.trials.leaderboard import (
    Leaderboard,
    TrialResult,
    export_best,
    has_ended,
    read_leaderboard,
    with_importances,
)
from tuning.trials.mlflow_descriptions import sweep_description
from tuning.trials.repeats import plan_repeats
from tuning.trials.trial import LAST_RESULT_FILE, Sweep
from tuning.tuner import (
    TUNE_FOLDER,
    TrialCallback,
    create_repeats_tuner,
    create_tuner,
    end_interrupted_trials,
    epochs_per_trial,
    trial_events,
    trial_folder_name,
)

BEST_SPEC_FILE = "best.yaml"
_folder_name = trial_folder_name
"""The name in Tune's state of sweeps that version 0.1.0 began, when all of this was one module."""

logger = logging.getLogger(__name__)


def new_sweep(
    name: str, overrides: list[str], sweep_name: str | None, like: str | None = None
) -> Sweep:
    """A new sweep of the spec `name`, in a folder of its own.

    It first tries the values of the run or the best trials of the sweep `like`.
    """
    stem, spec = read_sweep_spec(name, overrides)
    data = run.resolved_data(spec)
    trials = earlier.add_earlier(data, spec.sweep, like)
    spec, workload = resolve(data, SweepRunSpec)
    dataset, datasets = prepare_datasets(data, spec)
    check_metrics(spec, workload, dataset)
    name = sweep_name or unique_name(f"{stem}-sweep")
    folder = run.claim_folder(Path(spec.storage), name, data, "sweep")
    sweep = Sweep(data, spec.sweep, dataset, folder, datasets=datasets)
    earlier.record_earlier_trials(sweep, trials)
    return sweep


def resumed_sweep(name: str, storage: Path, overrides: Sequence[str] = ()) -> Sweep:
    """An interrupted sweep, to be continued, or one that has ended, to be given more trials.

    Only the fields in `sweep_checks.CHANGEABLE` can be changed.
    """
    folder = find_run_folder(name, storage)
    require_kind(folder, "sweep")
    check_overrides(overrides)
    data = apply_overrides(read_spec(folder), overrides)
    spec, _ = resolve(data, SweepRunSpec)
    check_trials(folder, spec.sweep, overrides)
    check_folds(data, spec.sweep)
    dataset, datasets = prepare_datasets(data, spec)
    if overrides:
        run.refuse_secrets(data)
        with locked(folder):
            write_yaml(data, folder / SPEC)
    sweep = Sweep(data, spec.sweep, dataset, folder, datasets=datasets)
    earlier.complete_journal(sweep)
    return sweep


def run_to_end(
    sweep: Sweep, on_trial_event: TrialCallback, log_line: Callable[[str], None] = lambda line: None
) -> tuple[Leaderboard, dict[str, Any]]:
    """Run a sweep, or the rest of it, in the Ray that is connected.

    Trials that failed before run again. A mistake that every trial makes ends the sweep, and so
    does Ctrl-C; its state is saved then. `log_line` gets a line on how trials share devices.
    Returns the leaderboard, and the sweep's data in MLflow (`Tracker.read`, or `unsent`), with
    `account` and `reason` as `trainers.runs.run.run_to_end` returns them, and `failure`: a line
    where the sweep failed. After an error the sweep's MLflow run is ended too, and nothing that
    fails then hides the error.
    """
    spec, _ = resolve(sweep.spec_data, SweepRunSpec)
    tracker = mlflow_run.start_tracking(sweep.folder, spec, sweep.spec_data, kind="sweep")
    again = [sweep.trial_key(number) for number in run_failed_again(sweep)]
    for key in [sweep.key, *again] if (sweep.folder / TUNE_FOLDER).exists() else []:
        tracker.set_tags.remote(key, {"heliostat.reason": ""})  # of before
    watch = MistakeWatch(sweep)
    end = _SweepEnd(sweep, tracker, watch)

    def on_event(event: str, number: int, result: dict[str, Any]) -> None:
        on_trial_event(event, number, result)
        if watch.on_trial_event(event, number, result):
            signal.raise_signal(signal.SIGINT)  # it ends Ray Tune

    with (
        _finally(end.finish),
        _finally(lambda error: end.record_results()),
        open_budget(sweep, spec, tracker, epochs_per_trial(sweep, spec)) as budget,
        _finally(lambda error: end.settle(budget)),
        trial_events(sweep, on_event),
    ):
        if not (sweep.spec.repeated_fields and _search_has_ended(sweep)):
            with _fused_slots(sweep, spec, tracker, log_line) as slots:
                create_tuner(sweep, spec, tracker, slots).fit()
        _repeat_best(sweep, spec, tracker, budget, log_line)
    board = end.track_importances()
    if has_ended(sweep, board):
        export_best(sweep, board)
    return board, {**mlflow_run.end_tracking(tracker, sweep.key), **end.summary}


def _search_has_ended(sweep: Sweep) -> bool:
    return len(read_leaderboard(sweep).ended) >= sweep.spec.total_trials


def _repeat_best(
    sweep: Sweep,
    spec: SweepRunSpec,
    tracker: Any,
    budget: SweepBudget,
    log_line: Callable[[str], None],
) -> None:
    """Train the best configurations as often as `sweep.repeat` and `sweep.folds` say.

    Does nothing as long as a trial of the search has not ended. The engines have ended: there are
    too few of these trials to fuse, and those of other folds have other data.
    """
    if not sweep.spec.repeated_fields or not _search_has_ended(sweep):
        return
    board = read_leaderboard(sweep)
    finalists = {result.number: result.parameters for result in board.finalists(sweep.spec)}
    left = plan_repeats(sweep, finalists)
    if left and budget.can_start_trial():
        log_line(f"{len(left)} more trainings of the {len(finalists)} best configurations")
        create_repeats_tuner(sweep, spec, tracker, left).fit()


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

    def __init__(self, sweep: Sweep, tracker: Any, watch: MistakeWatch) -> None:
        self._sweep, self._tracker, self._watch = sweep, tracker, watch
        self._status = "KILLED"
        self._tags: dict[str, str] = {}
        self._board: Leaderboard | None = None
        self.summary: dict[str, Any] = {}
        """`account`: lines on the costs. `reason`: the limit of the budget that was reached.
        `failure`: a line where no trial has a result, or every trial would fail."""

    def settle(self, budget: SweepBudget) -> None:
        """Charge the rest to the budget."""
        lines, self._tags = settle(self._sweep, budget)
        self.summary = {"account": lines, "reason": budget.reason}

    def record_results(self) -> None:
        """Read the leaderboard, and write the best trial's spec."""
        key, spec = self._sweep.key, self._sweep.spec
        board = self._board = read_leaderboard(self._sweep)
        finished = has_ended(self._sweep, board)
        if board.best is not None:
            best_spec = self._sweep.folder / BEST_SPEC_FILE
            fused = bool(fusion_plan.planned_slots(self._sweep))
            write_best(self._sweep, board.best, best_spec, fused)
            self._tracker.log_artifact.remote(key, str(best_spec))
            if finished:
                self._tracker.log.remote(key, _best_metrics(spec.metric, board.best), 0)
        if board.pareto_trials:
            numbers = [f"{number:04d}" for number in board.pareto_trials]
            self._tags["heliostat.pareto_front"] = ", ".join(numbers)
        self._tags[DESCRIPTION_TAG] = self._description(board)
        self._status = "FINISHED" if finished else "KILLED"
        all_failed = finished and not board.results and bool(board.failed)
        failure = self._watch.line or f"all {len(board.ended)} trials failed" * all_failed
        if failure:
            self._status, self.summary["failure"] = "FAILED", failure

    def finish(self, error: BaseException | None) -> None:
        """End the sweep's MLflow run, and those of its trials that go on no more."""
        end_interrupted_trials(self._sweep, self._tracker)
        tags = self._tags
        if self._status != "FINISHED":
            known = self.summary.get("failure") or self.summary.get("reason")
            reason = known or (str(error) if error else "")
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


def _best_metrics(metric: str, best: TrialResult) -> list[tuple[str, float, int, int]]:
    """The best trial's value and, where its configuration was repeated, the mean of its values."""
    found = {f"best/{metric}": best.value}
    if best.repeated is not None and best.repeated.complete:
        found |= {
            f"best/{metric}/mean": best.repeated.mean,
            f"best/{metric}/half_width": best.repeated.half_width,
        }
    return [(name, value, 0, now_ms()) for name, value in found.items()]


def _earlier_plan(sweep: Sweep) -> fusion_plan.FusionPlan | None:
    """The plan with which the sweep began, unless that was made for a workload with a mistake.

    With another plan Ray Tune begins anew: its state is that of trials in processes.
    """
    plan = fusion_plan.load_plan(sweep)
    evaluated = any(sweep.folder.glob(f"{TRIALS}/*/{LAST_RESULT_FILE}"))
    if plan is None or plan.slots or evaluated:
        return plan
    shutil.rmtree(sweep.folder / TUNE_FOLDER, ignore_errors=True)
    return None


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
        plan = _earlier_plan(sweep) or fusion_plan.plan_from_spec(sweep)
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
