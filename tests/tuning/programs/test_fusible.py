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
from tests.trainers.checkpoints.test_state import ExtraState, LateBuffers, Lazy
from tests.trainers.wild import Base, spec_of, split
from trainers import Batch, Spec, Workload
from trainers.counter_rng import SampleRandom
from trainers.devices import Cpu
from trainers.engine.step import TrainStep
from trainers.modeling.build import build_network
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant, unsupported_reason
from tuning.programs.vmap_rewrites import NotFusibleError
from tuning.spaces.space import trial_spec_data


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


BACKWARD_HOOKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "0.weight": (lambda model, hook: model[0].weight.register_hook(hook), torch.neg),
    "0.bias": (
        lambda model, hook: model[0].bias.register_post_accumulate_grad_hook(hook),
        lambda weight: None,
    ),
    "the model": (
        lambda model, hook: model.register_full_backward_hook(hook),
        lambda model, given, taken: None,
    ),
    "2": (
        lambda model, hook: model[2].register_full_backward_pre_hook(hook),
        lambda model, taken: (0.5 * taken[0],),
    ),
}
"""Part of a model -> how it gets a hook, and the hook."""


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

    @pytest.mark.parametrize("place", BACKWARD_HOOKS)
    def test_has_hooks_on_its_backward_pass(self, place: str) -> None:
        class Hooked(Points):
            def build(self) -> nn.Module:
                network = super().build()
                register, hook = BACKWARD_HOOKS[place]
                register(network, hook)
                return network

        with pytest.raises(NotFusibleError, match=f"^{place} has hooks on its backward pass"):
            program_of(trial(Hooked))

    def test_has_hooks_that_show_in_the_gradient_only(self) -> None:
        """The losses of the first step are equal."""

        class Sought(Points):
            def forward(self, model: nn.Module, batch: Batch) -> Tensor:
                h = model[0](batch["x"])
                if h.requires_grad:
                    h.register_hook(lambda gradient: -gradient)
                return model[1:](h)

        class Function(Points):
            def forward(self, model: nn.Module, batch: Batch) -> Tensor:
                h = model[0](batch["x"])
                if h.grad_fn is not None:
                    h.grad_fn.register_prehook(lambda gradients: (0.5 * gradients[0],))
                return model[1:](h)

        class Accumulated(Points):
            def build(self) -> nn.Module:
                network = super().build()
                view = network[0].weight.view_as(network[0].weight)
                self.node = view.grad_fn.next_functions[0][0]
                self.node.register_prehook(lambda gradients: (0.5 * gradients[0],))
                return network

        for kind in (Sought, Function, Accumulated):
            with pytest.raises(NotFusibleError, match=r"^the gradient of 0\.weight is another one"):
                program_of(trial(kind))

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


class Repeated(Points):
    """One block several times, two blocks in turn, and a weight of its own for two layers."""

    def build(self) -> nn.Module:
        # What a norm takes away has only rounding for a gradient: AdamW makes whole steps of it.
        bare = [nn.Linear(3, 3, bias=False) for _ in range(2)]
        a, b = (nn.Sequential(linear, nn.BatchNorm1d(3), nn.Tanh()) for linear in bare)
        c = nn.Linear(3, 3)
        c.weight = a[0].weight
        network = nn.Sequential(a, a, b, a, b, c)
        network.add_module("again", a)
        network.add_module("last", nn.Linear(3, 3))
        return network


def test_modules_and_weights_under_several_names() -> None:
    """Each trial as alone, in a program and in the network that it gives back."""
    kinds = [trial(Repeated, train__seed=seed, train__precision="fp64") for seed in (0, 1)]
    program = program_of(kinds[0])
    for slot, each in enumerate(kinds):
        assert program.fits(each, built(each))
        program.load_trial(slot, each, built(each))
    found = program.run([0, 1], 5)
    for slot, each in enumerate(kinds):
        ordinary = TrainStep(each.spec, each.workload, SAMPLES, Worker(), each.total_steps)
        losses = [ordinary.run(step).item() for step in range(5)]
        assert [row[slot] for row in found] == pytest.approx(losses, rel=1e-9)
        network = program.network_with(program.state_of(slot))
        own = ordinary.network.state_dict()
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, own[name], rtol=1e-6, atol=1e-8, msg=name)
    assert network[0] is network[1] is network[3]
    assert network[5].weight is network[0][0].weight


def test_a_tensor_that_is_weight_and_buffer_is_not_fused() -> None:
    class Both(Points):
        def build(self) -> nn.Module:
            network = super().build()
            network.register_buffer("same", network[0].weight)
            return network

    with pytest.raises(NotFusibleError, match=r"^0\.weight is a parameter and the buffer same"):
        program_of(trial(Both))


def test_memory_grows_with_the_slots() -> None:
    one, two, four = (program_of(trial(), slots).peak_bytes() for slots in (1, 2, 4))
    assert 0 < two == pytest.approx(2 * one, rel=0.1)
    assert four == pytest.approx(4 * one, rel=0.1)


@pytest.mark.parametrize(
    ("workload", "reason"),
    [
        (ExtraState, "extra has extra state, which is not in tensors"),
        (LateBuffers, "a forward pass makes the buffer history or changes its shape"),
        (Lazy, "0.weight is of a lazy module, which has no shape yet"),
    ],
)
def test_state_of_another_form_than_the_built_one_is_not_fused(
    workload: type[Base], reason: str
) -> None:
    spec, instance = resolve(spec_of(workload), RunSpec)
    with pytest.raises(NotFusibleError) as caught:
        Program(Variant(spec, instance, 8), 2, split(instance, "train"), Cpu())
    assert str(caught.value) == reason
