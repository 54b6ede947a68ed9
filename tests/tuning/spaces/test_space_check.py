"""A sweep that may choose what its fields do not accept is refused before it begins."""

from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import write_yaml
from cluster.base.errors import SpecError
from tuning.spaces.space import SweepRunSpec, read_sweep_spec


def read(folder: Path, parameters: dict[str, Any], *overrides: str) -> SweepRunSpec:
    path = folder / "some.yaml"
    write_yaml({"workload": "vision", "sweep": {"parameters": parameters}}, path)
    return read_sweep_spec(str(path), list(overrides))[1]


RANGE = {"uniform": [0.1, 0.9]}
NAMES = {"choice": ["sgd", "adamw"]}


@pytest.mark.parametrize(
    ("parameters", "overrides", "problem"),
    [
        # Both ends are whole numbers, or multiples of the workers.
        (
            {"train.global_batch": {"uniform": [32, 64]}},
            [],
            "train.global_batch: train.global_batch: must be a valid integer, got a number with",
        ),
        (
            {"model.width": {"loguniform": [8, 64]}},
            [],
            "model.width: model.width: must be a valid integer",
        ),
        (
            {"train.global_batch": {"integer": [2, 64]}},
            ["scale.workers=2"],
            "train.global_batch: train.global_batch 3 cannot be shared evenly by scale.workers 2",
        ),
        (
            {"train.global_batch": {"log_integer": [3, 3000]}},
            ["scale.workers=3", "train.global_batch=3"],
            "train.global_batch: train.global_batch 4 cannot be shared evenly by scale.workers 3",
        ),
        (
            {"train.global_batch": {"integer": [6, 600], "step": 6}},
            ["train.micro_batch=12", "train.global_batch=12"],
            "train.global_batch: train.global_batch 6 is not a multiple of scale.workers 1 x",
        ),
        # Each value is valid, but not with each value of another parameter.
        (
            {
                "train.global_batch": {"choice": [32, 48]},
                "train.micro_batch": {"choice": [16, 32]},
            },
            [],
            "train.global_batch: train.global_batch 48 is not a multiple of scale.workers 1 x "
            "train.micro_batch 32, with train.micro_batch 32",
        ),
        (
            {"train.steps": {"choice": [10, None]}, "train.epochs": {"choice": [1.5, None]}},
            [],
            "train.steps: train: epochs and steps exclude each other; give one",
        ),
        # Conditions and ties.
        (
            {"optimizer.lr": {**RANGE, "when": {"optimizer.name": "sdg"}}, "optimizer.name": NAMES},
            [],
            "optimizer.lr.when.optimizer.name: is never 'sdg' (it can be 'sgd', 'adamw')",
        ),
        (
            {
                "optimizer.lr": {**RANGE, "when": {"optimizer.name": ["sgd", "lion"]}},
                "optimizer.name": NAMES,
            },
            [],
            "optimizer.lr.when.optimizer.name: is never 'lion'",
        ),
        (
            {"optimizer.lr": {**RANGE, "when": {"optimizer.momentum": 0.1}}}
            | {"optimizer.momentum": RANGE},
            [],
            "optimizer.lr.when.optimizer.momentum: has a continuous range; give it a choice",
        ),
        (
            {
                "optimizer.name": NAMES,
                "optimizer.momentum": {"choice": [0, 0.9], "when": {"optimizer.name": "sgd"}},
                "optimizer.lr": {
                    **RANGE,
                    "when": {"optimizer.momentum": 0.9, "optimizer.name": "adamw"},
                },
            },
            [],
            "optimizer.lr.when: its conditions never hold together",
        ),
        (
            {
                "optimizer": {"choice": [{"name": "sgd"}, {"lr": 0.1}]},
                "optimizer.momentum": {**RANGE, "when": {"optimizer.name": "sgd"}},
            },
            [],
            "optimizer: each choice must set optimizer.name, on which optimizer.momentum depends",
        ),
        (
            {"optimizer.momentum": {"same_as": "optimizer.weight_decay"}}
            | {"optimizer.weight_decay": {"uniform": [0, 2]}},
            [],
            "optimizer.momentum: optimizer.momentum: must be less than 1 (got",
        ),
        # Sections.
        (
            {"optimizer": {"choice": [{"name": "sgd", "lr": 0.1}]}, "optimizer.lr": RANGE},
            [],
            "optimizer.lr: optimizer.lr is set by sweep.parameters.optimizer as well",
        ),
        (
            {"recipe": {"choice": [{"optimizer.lr": 0.1}]}, "optimizer": {"choice": [{"lr": 1}]}},
            [],
            "optimizer: optimizer.lr is set by sweep.parameters.recipe as well",
        ),
        (
            {"optimizer": {"choice": [{"name": "sgd"}, {"name": "sgd", "momentun": 0.9}]}},
            [],
            "optimizer: optimizer.momentun: unknown key; did you mean 'momentum'?",
        ),
        (
            {"optimizer.betas.1": {"uniform": [0.9, 1.1]}},
            [],
            "optimizer.betas.1: optimizer.betas.1: ",
        ),
        ({"optimizer.betas.2": RANGE}, [], "optimizer.betas.2: optimizer.betas: has no key '2'"),
        ({"recipe": {"choice": [{"optimzer": {}}]}}, [], "recipe: optimzer: unknown key"),
        ({"recipe": {"choice": [{"storage": "a"}]}}, [], "recipe: storage: is the same for all"),
        # Choices and fixed fields.
        ({"train.seed": {"choice": [1, 2, 1]}}, [], "train.seed: the choice has 1 twice"),
        ({"budget.usd": {"choice": [1, 2]}}, [], "budget.usd: is that of the sweep as a whole"),
        ({"tracking.every_steps": {"choice": [1, 2]}}, [], "tracking.every_steps: is the same"),
        (
            {"checkpoint.metric": {"choice": ["val/a", "val/b"]}},
            [],
            "checkpoint.metric: trials rank their checkpoints by sweep.metric",
        ),
        # Data sets.
        (
            {"data.val_fraction": RANGE},
            [],
            "data.val_fraction: each value would be a data set of its own; give it a choice",
        ),
        ({"data.sise": {"choice": [1, 2]}}, [], "data.sise: data.sise: unknown key"),
    ],
)
def test_a_mistake_in_the_space_is_one_line(
    parameters: dict[str, Any], overrides: list[str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as caught:
        read(tmp_path, parameters, *overrides)
    assert str(caught.value).startswith(f"sweep.parameters.{problem}")
    assert "\n" not in str(caught.value)


def test_too_many_data_sets_are_refused(tmp_path: Path) -> None:
    parameters = {"data.size": {"integer": [8, 64]}, "data.channels": {"choice": [1, 2, 3]}}
    with pytest.raises(SpecError, match=r"data.size and data.channels have more than 100 combin"):
        read(tmp_path, parameters)


@pytest.mark.parametrize(
    "parameters",
    [
        {
            "train.global_batch": {"integer": [2, 64], "step": 2},
            "scale.workers": {"choice": [1, 2]},
        },
        {"train.global_batch": {"uniform": [32, 64], "step": 1}},
        {"optimizer.betas": {"choice": [[0.9, 0.99], [0.9, 0.999]]}},
        {"optimizer.betas.0": {"uniform": [0.8, 0.95]}, "model.width": {"choice": [8, 16]}},
        # One is valid only with the other, and the file's own value with neither.
        {
            "train.global_batch": {"choice": [66, 96]},
            "train.micro_batch": {"same_as": "train.global_batch"},
        },
        {
            "recipe": {"choice": [{"train.steps": 10}, {"train.epochs": 2.0}]},
            "optimizer.name": NAMES,
            "optimizer.momentum": {"choice": [0.0, 0.9], "when": {"optimizer.name": "sgd"}},
            "optimizer.lr": {**RANGE, "when": {"optimizer.momentum": [0.0]}},
        },
        {"data.val_fraction": {"choice": [0.1, 0.2]}, "data.size": {"integer": [8, 32], "step": 8}},
    ],
)
def test_a_space_of_which_each_trial_is_valid_is_accepted(
    parameters: dict[str, Any], tmp_path: Path
) -> None:
    assert list(read(tmp_path, parameters).sweep.parameters) == list(parameters)


def test_parameters_from_the_command_line(tmp_path: Path) -> None:
    """With the same dotted paths as any other field, whether the file has them or not."""
    spec = read(
        tmp_path,
        {"optimizer.lr": {"loguniform": [0.001, 0.1]}, "model.width": {"choice": [8, 16]}},
        "sweep.parameters.optimizer.lr={uniform: [0.1, 0.3], step: 0.1}",
        "sweep.parameters.optimizer.name={choice: [sgd, adamw]}",
        "sweep.parameters.optimizer.momentum={choice: [0, 0.9], when: {optimizer.name: sgd}}",
        "sweep.parameters.model.width=null",
        "sweep.parameters.optimizer.schedule.warmup.uniform=[0, 0.5]",
        "sweep.parameters.optimizer.schedule.warmup.step=0.25",
        "sweep.parameters.optimizer.schedule.warmup.when.optimizer.name=adamw",
        "sweep.parameters.data.val_fraction={choice: [0.1, 0.2]}",
    )
    found = {p: d.model_dump(exclude_defaults=True) for p, d in spec.sweep.parameters.items()}
    assert found == {
        "optimizer.lr": {"uniform": (0.1, 0.3), "step": 0.1},
        "optimizer.name": {"choice": ["sgd", "adamw"]},
        "optimizer.momentum": {"choice": [0, 0.9], "when": {"optimizer.name": "sgd"}},
        "optimizer.schedule.warmup": {
            "uniform": (0.0, 0.5),
            "step": 0.25,
            "when": {"optimizer.name": "adamw"},
        },
        "data.val_fraction": {"choice": [0.1, 0.2]},
    }
    with pytest.raises(SpecError, match=r"^sweep.parameters.optimizer.lr: uniform must be \[low"):
        read(tmp_path, {}, "sweep.parameters.optimizer.lr={uniform: [1, 0]}")
    with pytest.raises(SpecError, match=r"^sweep.parameters.optimizer.lr.unifrom: unknown key"):
        read(tmp_path, {}, "sweep.parameters.optimizer.lr={unifrom: [1, 0]}")


def test_conditions_on_ranges_that_are_too_long_to_list(tmp_path: Path) -> None:
    seed = {"train.seed": {"integer": [0, 2_000_000_000], "step": 2}}
    momentum = {"optimizer.momentum": {**RANGE, "when": {"train.seed": [4, 1_000_000]}}}
    assert read(tmp_path, {**seed, **momentum}).sweep.total_trials == 16
    odd = {"optimizer.momentum": {**RANGE, "when": {"train.seed": [4, 5]}}}
    with pytest.raises(SpecError, match=r"is never 5 \(it can be 0, 2, 4, 6, 8, 10, 12, 14, 16, "):
        read(tmp_path, {**seed, **odd})
