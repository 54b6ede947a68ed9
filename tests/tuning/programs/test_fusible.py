"""Which trials fit into a program, and which cannot be fused at all."""

import random as python_random
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.base.errors import TrainingError
from trainers import Batch, Spec, Workload
from trainers.counter_rng import SampleRandom
from trainers.devices import Cpu
from trainers.engine.step import TrainStep
from trainers.modeling.build import build_network
from trainers.spec import RunSpec
from trainers.worker import Worker
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant, unsupported_reason
from tuning.programs.vmap_rewrites import NotFusibleError
from tuning.trials.space import trial_spec_data


class Points(Workload):
    """A small network over points, which are shifted at random or not."""

    class Data(Spec):
        noise: float = 0.0

    class Model(Spec):
        width: int = 8
        depth: int = 1
        dropout: float = 0.1
        second: float = 0.2
        smoothing: float = 0.1
        move: float = 1.0

    def dataset(self) -> dict[str, Any]:
        return {}

    def build(self) -> nn.Module:
        width, model = self.model.width, self.model
        inner = [nn.Linear(width, width) for _ in range(model.depth)]
        ends = nn.Linear(3, width), nn.Linear(width, 3)
        return nn.Sequential(
            ends[0], nn.Dropout(model.dropout), *inner, nn.Dropout(model.second), ends[1]
        )

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        if self.model.move == 0:
            return batch
        return {**batch, "x": batch["x"] + self.model.move * random.normal(3)}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch["x"])
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        smoothing = self.model.smoothing
        return F.cross_entropy(output, batch["label"], reduction="none", label_smoothing=smoothing)


class Hidden(Points):
    """One of its floats is hidden in a closure."""

    def build(self) -> nn.Module:
        network, smoothing = super().build(), self.model.smoothing
        network.register_forward_hook(lambda module, _, output: output * (1 + smoothing))
        return network


SAMPLES = {
    "x": torch.randn(20, 3, generator=torch.Generator().manual_seed(0)),
    "label": torch.arange(20) % 3,
}


def trial(workload: type[Points] = Points, **values: Any) -> Variant:
    """A trial; `values` are fields of the spec, as SECTION__FIELD."""
    usual = {"workload": workload.__name__, "train": {"global_batch": 4, "clip_norm": 1.0}}
    data = trial_spec_data(
        usual, {name.replace("__", "."): value for name, value in values.items()}
    )
    sections = workload.Data(**data.get("data", {})), workload.Model(**data.get("model", {}))
    return Variant(RunSpec.model_validate(data), workload(*sections), 20)


def built(variant: Variant) -> nn.Module:
    return build_network(variant.spec.train, variant.workload)


def program_of(variant: Variant, slots: int = 2, **varied: Sequence[float]) -> Program:
    return Program(variant, slots, SAMPLES, Cpu(), varied)


class TestAProgramFits:
    @staticmethod
    @cache
    def program() -> Program:
        return program_of(trial(), dropout=(0.1, 0.2), smoothing=(0.0, 0.3), move=(0.5, 1.0))

    def fits(self, **values: Any) -> bool:
        other = trial(**values)
        return self.program().fits(other, built(other))

    def test_trials_with_other_floats(self) -> None:
        assert self.fits(optimizer__lr=0.5, optimizer__weight_decay=0.0)
        assert self.fits(optimizer__betas=(0.1, 0.2), optimizer__schedule={"name": "constant"})
        assert self.fits(train__clip_norm=7.0, train__seed=7, train__steps=70)
        assert self.fits(model__dropout=0.7, model__smoothing=0.5, model__move=0.01)
        assert self.fits(model__dropout=0.0, model__smoothing=0.0)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model__width", 9),
            ("model__depth", 2),
            ("data__noise", 0.1),
            ("train__global_batch", 5),
            ("train__precision", "bf16"),
            ("train__clip_norm", None),
            ("optimizer__name", "sgd"),
            ("workload", Hidden),
        ],
    )
    def test_no_trial_that_needs_another_program(self, field: str, value: Any) -> None:
        assert not self.fits(**{field: value})

    def test_no_trial_that_takes_another_branch(self) -> None:
        """`if self.model.move == 0` went the other way when the program was traced."""
        assert not self.fits(model__move=0.0)

    def test_no_trial_with_another_value_of_a_float_that_is_not_batched(self) -> None:
        assert not self.fits(model__second=0.3)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.Tensor.item": lambda loss: loss * loss.mean().item(),
    "torch.nn.functional.dropout": lambda loss: F.dropout(loss),
    "torch.Tensor.__bool__": lambda loss: loss if loss.mean() > 0 else -loss,
    "torch.Tensor.__getitem__": lambda loss: loss + loss[loss > 1].mean(),
}


class TestATrialThatCannotBeFused:
    @pytest.mark.parametrize("operation", REFUSED)
    def test_names_the_operation(self, operation: str) -> None:
        class Own(Points):
            def loss(self, output: Tensor, batch: Batch) -> Tensor:
                return REFUSED[operation](super().loss(output, batch))

        with pytest.raises(NotFusibleError, match=f"^{re.escape(operation)}: RuntimeError: "):
            program_of(trial(Own))

    @pytest.mark.parametrize("draw", [python_random.random, np.random.rand])
    def test_draws_from_a_generator_of_the_process(self, draw: Callable[[], float]) -> None:
        class Drawn(Points):
            def forward(self, model: nn.Module, batch: Batch) -> Tensor:
                return super().forward(model, batch) * draw()

        with pytest.raises(NotFusibleError, match=r"^the model draws from Python's or numpy's"):
            program_of(trial(Drawn))

    def test_has_weights_of_several_kinds(self) -> None:
        class Spectral(Points):
            def build(self) -> nn.Module:
                network = super().build()
                network.spectrum = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
                return network

            def forward(self, model: nn.Module, batch: Batch) -> Tensor:
                x = torch.fft.irfft(torch.fft.rfft(batch["x"]) * model.spectrum, n=3)
                return super().forward(model, {**batch, "x": x.to(batch["x"].dtype)})

        class Clock(Spectral):
            def build(self) -> nn.Module:
                network = super().build()
                network.spectrum = nn.Parameter(torch.ones(2, dtype=torch.double))
                return network

        for kind, name in ((Spectral, "complex64"), (Clock, "float64")):
            with pytest.raises(NotFusibleError, match=f"^spectrum is {name}: a slot's weights"):
                program_of(trial(kind))

    def test_breaks_a_rule_for_every_trial(self) -> None:
        class Mean(Points):
            def loss(self, output: Tensor, batch: Batch) -> Tensor:
                return super().loss(output, batch).mean()

        class Cut(Points):
            def loss(self, output: Tensor, batch: Batch) -> Tensor:
                return super().loss(output.detach(), batch)

        class Frozen(Points):
            def build(self) -> nn.Module:
                return super().build().requires_grad_(False)

        lines = {
            Mean: r"^Mean\.loss must return one value per sample, .* \[4\] \(got shape \[\],",
            Cut: r"^Cut\.loss must depend on the weights that are trained",
            Frozen: r"^Frozen\.build must return a network of which something is trained",
        }
        for kind, line in lines.items():
            with pytest.raises(TrainingError, match=line):
                program_of(trial(kind))

    def test_is_found_by_its_first_loss_and_its_neighbour_goes_on(self) -> None:
        like, other = trial(Hidden), trial(Hidden, model__smoothing=0.5)
        program = program_of(like, smoothing=(0.1, 0.5))
        assert program.fits(other, built(other))
        program.load_trial(0, other, built(other))
        program.load_trial(1, like, built(like))
        with pytest.raises(NotFusibleError, match=r"^a fused trial's first loss is .* alone it is"):
            program.run([0, 1], 10)
        ordinary = TrainStep(like.spec, like.workload, SAMPLES, Worker(), like.total_steps)
        losses = [ordinary.run(step).item() for step in range(20)]
        found = [loss for (loss,) in program.run([1], 10)]
        assert found == pytest.approx(losses[10:], rel=1e-5)

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            ("scale.workers", (1, 2)),
            ("train.precision", "fp16"),
            ("train.precision", "fp8"),
            ("train.micro_batch", 2),
            ("train.activation_checkpointing", True),
            ("train.on_nonfinite", "skip"),
        ],
    )
    def test_has_such_a_setting_in_its_spec(self, place: str, value: Any) -> None:
        spec = RunSpec.model_validate(trial_spec_data({"workload": "x"}, {place: value}))
        assert str(unsupported_reason(spec)).startswith(f"{place}: ")

    def test_is_not_one_with_the_default_spec(self) -> None:
        assert unsupported_reason(RunSpec(workload="x")) is None


def test_memory_grows_with_the_slots() -> None:
    one, two, four = (program_of(trial(), slots).peak_bytes() for slots in (1, 2, 4))
    assert 0 < two == pytest.approx(2 * one, rel=0.1)
    assert four == pytest.approx(4 * one, rel=0.1)
