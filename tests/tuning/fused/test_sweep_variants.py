"""Trials as variants: those of spaces with conditions, ties and choices of sections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import write_yaml
from tuning.fused.sweep_variants import distinct_programs, reference_variant, varied_floats
from tuning.sweep import new_sweep
from tuning.trials.trial import Sweep


@pytest.fixture
def sweep_of(own_folder: Path) -> Callable[[dict[str, Any]], Sweep]:
    """Makes a sweep over the spirals; nothing is run."""

    def make(parameters: dict[str, Any]) -> Sweep:
        spec = {"workload": "spirals:Spirals", "train": {"epochs": 2, "global_batch": 8}}
        write_yaml({**spec, "sweep": {"parameters": parameters}}, own_folder / "s.yaml")
        return new_sweep("s.yaml", [], None)

    return make


def test_a_program_for_each_value_also_where_a_condition_must_hold(
    sweep_of: Callable[[dict[str, Any]], Sweep],
) -> None:
    sweep = sweep_of(
        {
            "train.clip_norm": {"choice": [1.0, None], "when": {"optimizer.name": "sgd"}},
            "optimizer.name": {"choice": ["sgd", "adamw"]},
            "optimizer.lr": {"uniform": [0.1, 0.2]},
        }
    )
    variants, count = distinct_programs(sweep, most=8)
    found = {(each.spec.optimizer.name, each.spec.train.clip_norm) for each in variants}
    assert found == {("adamw", None), ("sgd", None), ("sgd", 1.0)}
    assert count >= 3
    assert reference_variant(sweep).spec.optimizer.name == "adamw"


def test_a_tied_float_of_the_model_is_batched_with_the_values_of_the_other(
    sweep_of: Callable[[dict[str, Any]], Sweep],
) -> None:
    tied = {"model.dropout": {"same_as": "optimizer.momentum"}}
    sweep = sweep_of({**tied, "optimizer.momentum": {"uniform": [0.1, 0.9]}})
    reference = reference_variant(sweep)
    assert reference.workload.model.dropout == reference.spec.optimizer.momentum == 0.9
    assert varied_floats(sweep, reference) == {"dropout": [0.1, 0.9]}
    assert distinct_programs(sweep, most=8)[1] == 1


def test_sections_that_need_programs_of_their_own(
    sweep_of: Callable[[dict[str, Any]], Sweep],
) -> None:
    models = [{"width": 8}, {"width": 16}, {"width": 16, "dropout": 0.5}]
    sweep = sweep_of({"model": {"choice": models}, "optimizer.lr": {"choice": [0.1, 0.2]}})
    variants, count = distinct_programs(sweep, most=8)
    assert count == 3
    built = [(each.workload.model.width, each.workload.model.dropout) for each in variants]
    assert sorted(built)[0][0] == 8
    assert len(built) == 3
