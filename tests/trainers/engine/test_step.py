"""The random numbers of one step, those of the model itself, and activation checkpointing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.base.errors import SpecError
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split
from trainers.engine.step import TrainStep
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker


def stepper(own_folder: Path, **train: Any) -> TrainStep:
    data = {"workload": "spirals:Spirals", "train": {"global_batch": 32, **train}}
    spec, workload = resolve(data, RunSpec)
    split = open_split(prepare_dataset(workload, own_folder), "train")
    return TrainStep(spec, workload, split, Worker(), 10)


OWN_BLOCKS = (
    "    def build(self):",
    "    def blocks(self, model):\n        return [model]\n\n    def build(self):",
)


def change(own_folder: Path, old: str, new: str) -> None:
    """Edit the user's workload."""
    path = own_folder / "spirals.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))


NATIVE = {
    "functional": ('return model(batch["point"])', 'return F.dropout(model(batch["point"]))'),
    "subclass": ("nn.Dropout(self.model.dropout)", "type('Own', (nn.Dropout,), {})(0.1)"),
    "augmentation": (
        "    def build(self):",
        "    def augment(self, batch, random):\n"
        "        return {**batch, 'point': batch['point'] + torch.randn(2)}\n\n"
        "    def build(self):",
    ),
}


@pytest.mark.parametrize("compile", ["off", "default"])
def test_dropout_modules_are_not_the_models_own_random_numbers(
    compile: str, own_folder: Path
) -> None:
    steps = stepper(own_folder, compile=compile)
    assert steps.uses_native_rng is None
    steps.run(0)
    assert steps.uses_native_rng is False


@pytest.mark.parametrize("case", NATIVE)
def test_random_numbers_of_the_model_are_noticed_in_the_first_step(
    case: str, own_folder: Path
) -> None:
    change(own_folder, *NATIVE[case])
    steps = stepper(own_folder)
    steps.run(0)
    assert steps.uses_native_rng is True


def test_random_numbers_of_the_model_are_the_same_whenever_a_step_is_done(own_folder: Path) -> None:
    change(own_folder, *NATIVE["subclass"])
    losses = []
    for _ in range(2):
        torch.rand(7)
        losses.append(stepper(own_folder).run(3))
    assert losses[0].equal(losses[1])


def test_a_step_with_activation_checkpointing_is_the_same_step(own_folder: Path) -> None:
    change(own_folder, *OWN_BLOCKS)
    plain = stepper(own_folder, micro_batch=8)
    recomputed = stepper(own_folder, micro_batch=8, activation_checkpointing=True)
    assert [name for name, _ in plain.network.named_modules()] == [
        name for name, _ in recomputed.network.named_modules()
    ]
    assert type(recomputed.network).__name__ == "RecomputedSequential"
    for step in range(3):
        assert plain.run(step).equal(recomputed.run(step))
    for weight, same in zip(
        plain.network.parameters(), recomputed.network.parameters(), strict=True
    ):
        assert weight.equal(same)


def test_activation_checkpointing_needs_blocks(own_folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^train\.activation_checkpointing: the model has no"):
        stepper(own_folder, activation_checkpointing=True)
