"""What a new sweep takes from earlier ones: points to try first, and trials to learn from."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.base.config import flatten, read_yaml
from cluster.base.errors import SpecError
from trainers.run_folder import SPEC, display_path, folder_kind
from trainers.spec import resolve
from tuning.spaces.constraints import total_violation, violations
from tuning.spaces.distributions import Parameters, equal
from tuning.spaces.space import SweepRunSpec, SweepSpec
from tuning.spaces.suggestion import assignments, suggest
from tuning.trials.budget import trial_costs
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import read_leaderboard
from tuning.trials.ranking import is_ranked, losses, objective_modes
from tuning.trials.trial import JOURNAL_FILE, Sweep, last_result

LIKE_TRIALS = 3
"""Trials of a sweep that `--like` tries first: its best ones."""

EarlierTrials = dict[str, list[dict[str, Any]]]
"""Folder of an earlier sweep -> its trials, as `Journal.earlier` has them."""


def add_earlier(spec_data: dict[str, Any], sweep: SweepSpec, like: str | None) -> EarlierTrials:
    """Put the points of `--like` and the folders of `sweep.warm_start` into a new sweep's spec.

    Returns the trials to learn from. Raises SpecError as `points_like` and `find_earlier_trials`.
    """
    if like is not None:
        points = points_like(sweep, like, Path(spec_data["storage"]))
        spec_data["sweep"]["enqueue"] = [*sweep.enqueue, *points]
    found = find_earlier_trials(spec_data, sweep)
    spec_data["sweep"]["warm_start"] = list(found)
    return found


def points_like(sweep: SweepSpec, name: str, storage: Path) -> list[dict[str, Any]]:
    """The values of a run, or of a sweep's best trials, as points for `sweep.enqueue`.

    A value outside of the sweep's space is left out, so that the search chooses one. Raises
    SpecError if there is no such run, and if all its values are outside.
    """
    folder = _find(name, storage, "--like")
    if folder_kind(folder) == "sweep":
        earlier = _read_sweep(folder)
        ranked = [
            result
            for result in read_leaderboard(earlier).results
            if is_ranked(earlier.spec, result.value)
        ]
        specs = [earlier.trial_spec_data(result.parameters) for result in ranked[:LIKE_TRIALS]]
    else:
        specs = [read_yaml(folder / SPEC)]
    points = [_point(sweep.parameters, spec_data) for spec_data in specs]
    found = [point for number, point in enumerate(points) if point and point not in points[:number]]
    if not found:
        raise SpecError(f"--like {name}: has no values that are within sweep.parameters")
    return found


def find_earlier_trials(spec_data: Mapping[str, Any], sweep: SweepSpec) -> EarlierTrials:
    """The trials of the sweeps in `sweep.warm_start` whose values are in the space of `sweep`.

    What the two sweeps do not vary may differ. Raises SpecError for a sweep that compares its
    trials by something else, and for one without such trials.
    """
    found: EarlierTrials = {}
    for name in sweep.warm_start:
        place = f"sweep.warm_start: {name}"
        folder = _find(name, Path(spec_data["storage"]), "sweep.warm_start:")
        if folder_kind(folder) != "sweep":
            raise SpecError(f"{place}: is no sweep; heliostat sweep --like {name} tries its values")
        earlier = _read_sweep(folder)
        if earlier.spec_data["workload"] != spec_data["workload"]:
            raise SpecError(f"{place}: is of another workload, {earlier.spec_data['workload']}")
        theirs, ours = objective_modes(earlier.spec), objective_modes(sweep)
        if theirs != ours:
            words = [
                ", ".join(f"{k} {mode}" for k, mode in each.items()) for each in (theirs, ours)
            ]
            raise SpecError(f"{place}: compares its trials by {words[0]}, this sweep by {words[1]}")
        if earlier.spec.scheduler.name == "pbt":
            raise SpecError(f"{place}: pbt changed the parameters of its trials as they ran")
        found[str(folder)] = _trials(earlier, sweep)
        if not found[str(folder)]:
            raise SpecError(f"{place}: none of its trials is within sweep.parameters")
    return found


def record_earlier_trials(sweep: Sweep, found: EarlierTrials) -> None:
    """Add them to the journal of a sweep that has not suggested a trial yet."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    for folder, trials in found.items():
        if folder not in journal.earlier and not journal.parameters:
            journal.record_earlier(folder, trials)


def complete_journal(sweep: Sweep) -> None:
    """Record the earlier trials of a sweep that was killed before it did so."""
    if sweep.spec.warm_start and not Journal(sweep.folder / JOURNAL_FILE).parameters:
        record_earlier_trials(sweep, find_earlier_trials(sweep.spec_data, sweep.spec))


def _find(name: str, storage: Path, place: str) -> Path:
    for folder in (storage / name, Path(name)):
        if (folder / SPEC).is_file():
            return folder.absolute()
    raise SpecError(f"{place} {name}: no such run or sweep in {display_path(storage)}")


def _read_sweep(folder: Path) -> Sweep:
    """A sweep whose results are read; its data set is not needed."""
    data = read_yaml(folder / SPEC)
    spec, _ = resolve(data, SweepRunSpec)
    return Sweep(data, spec.sweep, Path(), folder)


def _trials(earlier: Sweep, sweep: SweepSpec) -> list[dict[str, Any]]:
    from optuna.trial import FixedTrial

    journal, found = Journal(earlier.folder / JOURNAL_FILE), []
    costs = trial_costs(earlier) if sweep.constraints else {}
    for number, end in journal.ends.items():
        point = _point(
            sweep.parameters,
            earlier.trial_spec_data(journal.parameters_after(number)),
            in_optuna=True,
        )
        last = last_result(earlier.trial_folder(number)) | costs.get(number, {})
        if end["value"] is None or total_violation(sweep.constraints, last) == math.inf:
            continue
        try:
            parameters = suggest(FixedTrial(point), sweep)
        except ValueError:  # a value that is missing
            continue
        trial = {name: end[name] for name in ("value", "step", "complete")}
        if len(sweep.objective) > 1:
            trial["losses"] = end.get("losses") or list(losses(earlier.spec, last))
        if sweep.constraints:
            trial["violations"] = violations(sweep.constraints, last)
        found.append({"parameters": parameters, **trial})
    return found


def _point(
    parameters: Parameters, spec_data: Mapping[str, Any], in_optuna: bool = False
) -> dict[str, Any]:
    """The values of a spec that are in a space, as they are or in Optuna's form."""
    fields, point = flatten(spec_data), {}
    for path, distribution in parameters.items():
        if distribution.same_as is not None:
            continue
        for value in distribution.choice or [fields.get(path)]:
            own = flatten(assignments({path: value}))
            if not all(field in fields and equal(fields[field], own[field]) for field in own):
                continue
            with contextlib.suppress(ValueError):
                in_form = distribution.optuna_value(value)
                point[path] = in_form if in_optuna else value
                break
    return point
