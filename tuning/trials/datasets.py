"""The data sets of a sweep: one, or one for each section `data` that its trials can have."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from trainers.data.dataset import prepare_dataset
from trainers.spec import RunSpec, resolve
from tuning.spaces.space import SweepRunSpec, trial_spec_data
from tuning.spaces.suggestion import section_values


def dataset_key(spec: RunSpec) -> str:
    """Equal for trials with the same data set."""
    return json.dumps(spec.data, sort_keys=True, default=str)


def prepare_datasets(
    spec_data: Mapping[str, Any], spec: SweepRunSpec
) -> tuple[Path, dict[str, Path]]:
    """Prepare all data sets of a sweep, in the order in which its choices list them.

    Returns that of the spec itself, or the first one if no trial has that, and those of the
    trials by `dataset_key`.
    """
    found: dict[str, Path] = {}
    folds = [_of_data(setting) for setting in spec.sweep.repeat_settings(0)]
    every = product(section_values(spec.sweep.parameters, "data"), [{}, *folds])
    for chosen, fold in every:
        of_trial = trial_spec_data(spec_data, {**chosen, **fold})["data"]
        trial, workload = resolve({**spec_data, "sweep": None, "data": of_trial}, RunSpec)
        if dataset_key(trial) not in found:
            path = prepare_dataset(workload, Path(spec.storage), spec.datasets)
            found[dataset_key(trial)] = path
    return found.get(dataset_key(spec), next(iter(found.values()))), found


def _of_data(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {path: value for path, value in setting.items() if path.startswith("data.")}
