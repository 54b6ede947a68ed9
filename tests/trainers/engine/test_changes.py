"""A spec whose fields change while the run goes on: the steps before have one, those after another.

So a trial of pbt is trained once more, in one run and to the last bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainers.engine.test_loop import Recorder
from tests.trainers.plain_loop import (
    BATCH,
    STEPS,
    Points,
    assert_same,
    last_state,
    order_of_samples,
    spec_of,
    workload_of,
)
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.counter_rng import combine_seeds
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split
from trainers.engine.loop import train
from trainers.outcome import Outcome
from trainers.spec import RunSpec, resolve

FIRST, SECOND = 7, 12
CHANGES = [
    {"step": FIRST, "set": {"optimizer.lr": 0.3, "optimizer.weight_decay": 0.01}},
    {"step": SECOND, "set": {"train.clip_norm": 0.05}},
]
SGD = {"name": "sgd", "lr": 0.1, "weight_decay": 0.2, "momentum": 0.0}


def test_each_step_has_the_fields_of_its_part(tmp_path: Path) -> None:
    """Against a plain loop in float64, with fixed rates."""
    workload = workload_of(Points)
    dataset = prepare_dataset(workload, tmp_path)
    optimizer = {**SGD, "schedule": {"name": "constant", "warmup": 0}}
    spec = spec_of(
        workload="tests.trainers.plain_loop:Points", optimizer=optimizer, changes=CHANGES
    )
    recorder = Recorder()
    outcome = train(spec, workload, dataset, tmp_path / "run", recorder)
    assert outcome.complete
    assert recorder.ticks == list(range(1, STEPS + 1))
    rates = [0.1 if step < FIRST else 0.3 for step in range(STEPS)]
    assert list(recorder.rows["train/lr"].values()) == pytest.approx(rates)

    torch.manual_seed(combine_seeds(0))
    network = workload.build().double()
    split = open_split(dataset, "train")
    for step, index in enumerate(order_of_samples(STEPS).split(BATCH)):
        batch = {"x": split["x"][index].double(), "y": split["y"][index]}
        loss = workload.loss(workload.forward(network, batch), batch).mean()
        network.zero_grad()
        loss.backward()
        if step >= SECOND:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.05)
        with torch.no_grad():
            for weight in network.parameters():
                decay = (0.2 if step < FIRST else 0.01) if weight.ndim > 1 else 0.0
                weight -= rates[step] * (weight.grad + decay * weight)
    assert_same(last_state(tmp_path / "run"), network)


SPIRALS: dict[str, Any] = {
    "workload": "spirals:Spirals",
    "train": {"epochs": 5, "global_batch": 70},
    "checkpoint": {"every_steps": 1, "keep": 100},
    "tracking": {"every_steps": 1},
}
OTHER = {"optimizer.lr": 0.02, "model.dropout": 0.5}


def trained(folder: Path, data: dict[str, Any], stop_after: int | None = None) -> Outcome:
    spec, workload = resolve(data, RunSpec)
    dataset = prepare_dataset(workload, folder.parent)
    return train(spec, workload, dataset, folder, Recorder(stop_after))


def states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each checkpoint by its name."""
    from safetensors.torch import load_file

    found = sorted((folder / "checkpoints").glob("step-*"))
    return {path.name: load_file(path / "state-00000.safetensors") for path in found}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_it_is_the_same_as_going_on_with_anothers_state_by_other_fields(
    name: str, own_folder: Path
) -> None:
    """As a trial of pbt does: also with another optimizer, which begins anew."""
    changed = {**OTHER, "optimizer.name": name}
    data = {**SPIRALS, "changes": [{"step": 6, "set": changed}]}
    assert trained(own_folder / "whole", data).complete

    trained(own_folder / "donor", SPIRALS)
    donors = Checkpoints(own_folder / "donor" / "checkpoints").at(6)
    taker = own_folder / "taker"
    Checkpoints(taker / "checkpoints").replace_by(donors)
    model, optimizer = {"dropout": 0.5}, {"lr": 0.02, "name": name}
    assert trained(taker, {**SPIRALS, "model": model, "optimizer": optimizer}).complete
    whole, again = states(own_folder / "whole"), states(taker)
    for step in again:
        assert_equal(whole[step], again[step])
    assert len(again) == 20 - 6 + 1


@pytest.mark.parametrize("stop_after", [5, 6, 7, 12])
def test_a_run_that_was_stopped_goes_on_in_the_part_where_it_was(
    stop_after: int, own_folder: Path
) -> None:
    changes = [{"step": 6, "set": OTHER}, {"step": 12, "set": {"optimizer.lr": 0.001}}]
    data = {**SPIRALS, "changes": changes}
    trained(own_folder / "whole", data)
    assert not trained(own_folder / "cut", data, stop_after).complete
    assert trained(own_folder / "cut", data).complete
    whole, cut = states(own_folder / "whole"), states(own_folder / "cut")
    assert whole.keys() == cut.keys()
    for step in whole:
        assert_equal(whole[step], cut[step])


def test_changes_after_the_last_step_are_none(own_folder: Path) -> None:
    late = [{"step": 20, "set": {"optimizer.name": "sgd"}}, {"step": 99, "set": OTHER}]
    assert trained(own_folder / "late", {**SPIRALS, "changes": late}).complete
    assert trained(own_folder / "late", {**SPIRALS, "changes": late}).complete
    trained(own_folder / "none", SPIRALS)
    late_states, none = states(own_folder / "late"), states(own_folder / "none")
    assert late_states.keys() == none.keys()
    for step in none:
        assert_equal(late_states[step], none[step])
