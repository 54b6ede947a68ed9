"""Many trials as one program: each computes what it computes alone, whatever its neighbours do."""

import itertools
import math
import runpy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.base.errors import TrainingError
from trainers import Batch, Spec, Workload
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checks.finite import not_finite
from trainers.devices import Cpu
from trainers.engine.step import TrainStep
from trainers.modeling.build import build_network
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workloads.vision.workload import Vision
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant
from tuning.programs.trial_state import TrialState
from tuning.spaces.space import trial_spec_data

pytestmark = pytest.mark.thorough

Text = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "models.py"))["Text"]
STEPS = 200
Values = dict[str, Any]
"""Values of a trial's spec, by dotted path."""
NOTHING: Values = {}
State = Mapping[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads do not help with tensors this small, and slow down on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Divided(nn.Linear):
    temperature: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


class Points(Workload):
    """A small network over points, with two dropout rates and a divisor in its modules."""

    class Model(Spec):
        width: int = 8
        dropout: float = 0.1
        second: float = 0.2
        temperature: float = 1.0
        smoothing: float = 0.0

    def dataset(self) -> dict[str, Any]:
        return {}

    def build(self) -> nn.Module:
        width, last = self.model.width, Divided(self.model.width, 3)
        last.temperature = self.model.temperature
        dropouts = nn.Dropout(self.model.dropout), nn.Dropout(self.model.second)
        first = nn.Sequential(nn.Linear(3, width), nn.Tanh(), dropouts[0])
        return nn.Sequential(first, nn.Linear(width, width), dropouts[1], last)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch["x"])
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        smoothing = self.model.smoothing
        return F.cross_entropy(output, batch["label"], reduction="none", label_smoothing=smoothing)


class Pictures(Points):
    """Convolutions with batch normalization."""

    def build(self) -> nn.Module:
        width = self.model.width
        first = [nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        second = [nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(width * 4, 3))


class Half(Points):
    """Some weights are frozen, some unused."""

    def build(self) -> nn.Module:
        network = nn.ModuleDict({"used": super().build(), "unused": nn.Linear(3, 3)})
        network["used"][0].requires_grad_(False)
        return network

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().forward(model["used"], batch)


class Held(Points):
    """A part stays in evaluation mode: its statistics are kept, and its dropout is off."""

    def build(self) -> nn.Module:
        width, divided = self.model.width, super().build()
        held = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
        held[1].running_mean.fill_(0.5)
        norm = nn.BatchNorm1d(width)
        return nn.Sequential(held, divided[0], norm, *divided[1:])


class Complex(Points):
    """A complex buffer, and one in more precision than the weights."""

    def build(self) -> nn.Module:
        network = super().build()
        network.register_buffer("phase", torch.tensor([1j, 0.5]))
        network.register_buffer("shift", torch.tensor(1 / 3, dtype=torch.float64))
        return network

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        turned = torch.fft.irfft(torch.fft.rfft(batch["x"]) * model.phase, n=3)
        x = turned + model.shift.to(turned.dtype)
        return super().forward(model, {**batch, "x": x})


class Spoilt(Points):
    """The gradient is NaN from the sixth step on."""

    def build(self) -> nn.Module:
        network = super().build()
        network.register_buffer("seen", torch.zeros(()))
        return network

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return super().loss(output, batch) + self.extra

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        model.seen.add_(1)
        output = super().forward(model, batch)
        late = (model.seen > 5) & (batch["label"] >= 0)
        self.extra = torch.where(late, output.sum(1) * 0, 1.0).sqrt()  # its derivative: 0 / 0
        return output


class Words(Points):
    """Points as words, one of which is padding."""

    def build(self) -> nn.Module:
        embedding = nn.Embedding(4, self.model.width, padding_idx=0)
        return nn.Sequential(embedding, nn.Flatten(), nn.Linear(3 * self.model.width, 3))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().forward(model, {"x": batch["x"].abs().long().clamp(max=3)})


class Stamped(Points):
    """Points at moments whose differences float32 cannot tell, with float64 columns."""

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().forward(model, {"x": batch["stamp"].diff(dim=1) @ batch["turn"][0]})

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return super().loss(output, batch) + F.mse_loss(output[:, 0], batch["y"], reduction="none")


def random_samples() -> dict[type[Workload], Batch]:
    generator = torch.Generator().manual_seed(0)

    def whole(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (50, *shape), generator=generator)

    return {
        Pictures: {"x": torch.randn(50, 1, 6, 6, generator=generator), "label": whole(3)},
        Stamped: {
            "stamp": 1.7e9 + torch.randn(50, 4, generator=generator).double().cumsum(1),
            "turn": torch.eye(3).double().expand(50, 3, 3),
            "y": torch.randn(50, generator=generator).double(),
            "label": whole(3),
        },
        Points: {"x": torch.randn(50, 3, generator=generator), "label": whole(3)},
        Vision: {"image": whole(256, 1, 6, 6).byte(), "label": whole(10)},
        Text: {"tokens": whole(32, 9)},
    }


SAMPLES = random_samples()
SMALL: dict[type[Workload], Values] = {
    Pictures: {"model.width": 4},
    Vision: {"data.size": 6, "model.width": 4, "model.blocks": (1, 1)},
    Text: {"data.context": 8, "model": {"layers": 1, "width": 8, "heads": 2, "vocabulary": 32}},
}


def trial(workload: type[Workload], values: Values = NOTHING, steps: int = STEPS) -> Variant:
    """A trial in float64, with batches of 6, unless `values` say otherwise."""
    usual = {"workload": workload.__name__, "train": {"precision": "fp64", "global_batch": 6}}
    found = trial_spec_data(usual, {**SMALL.get(workload, {}), **values})
    data, model = (
        section.model_validate(found.get(name, {}))
        for name, section in (("data", workload.Data), ("model", workload.Model))
    )
    found |= {"data": data.model_dump(), "model": model.model_dump()}
    return Variant(RunSpec.model_validate(found), workload(data, model), steps)


def built(variant: Variant) -> nn.Module:
    return build_network(variant.spec.train, variant.workload)


def samples_of(variant: Variant) -> Batch:
    return next(batch for kind, batch in SAMPLES.items() if isinstance(variant.workload, kind))


def program_of(variant: Variant, slots: int = 3, **varied: Sequence[float]) -> Program:
    return Program(variant, slots, samples_of(variant), Cpu(), varied)


def stepper(variant: Variant) -> TrainStep:
    spec, workload = variant.spec, variant.workload
    return TrainStep(spec, workload, samples_of(variant), Worker(), variant.total_steps)


def state_of(network: nn.Module) -> State:
    return {name: value.clone() for name, value in network.state_dict().items()}


def alone(variant: Variant, steps: int = STEPS) -> tuple[list[float], list[State]]:
    """The losses of the ordinary steps; the weights before the first and after each."""
    ordinary = stepper(variant)
    losses, states = [], [state_of(ordinary.network)]
    for step in range(steps):
        losses.append(ordinary.run(step).item())
        states.append(state_of(ordinary.network))
    return losses, states


def assert_close(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


# Three trials of a workload differ in every number.

RULES: dict[str, list[tuple[float, float, Any]]] = {
    "adamw": [(4e-3, 0.1, (0.9, 0.999)), (1e-3, 0.0, (0.5, 0.9)), (2e-3, 0.5, (0.95, 0.99))],
    "sgd": [(0.02, 0.01, 0.9), (0.05, 0.1, 0.0), (0.01, 0.0, 0.5)],
}
"""Learning rate, weight decay, and betas or momentum."""
SCHEDULES = (
    {"name": "cosine", "warmup": 0.1},
    {"name": "linear", "warmup": 0.0, "final": 0.1},
    {"name": "constant", "warmup": 0.3},
)
VARIED: dict[type[Workload], dict[str, Sequence[float]]] = {
    Points: {
        "dropout": (0.1, 0.0, 0.5),
        "second": (0.2, 0.4, 0.0),
        "temperature": (1.0, 2.0, 0.5),
        "smoothing": (0.0, 0.1, 0.2),
    },
    Pictures: {"smoothing": (0.1, 0.0, 0.2)},
    Vision: {
        "dropout": (0.2, 0.0, 0.5),
        "label_smoothing": (0.1, 0.2, 0.0),
        "augment": (1.0, 0.5, 2.0),
    },
    Text: {},
}


def numbers(workload: type[Workload], rule: str, which: int) -> Values:
    lr, decay, own = RULES[rule][which]
    optimizer = {"lr": lr, "weight_decay": decay, "schedule": SCHEDULES[which]}
    return {
        "optimizer": {"name": rule, **optimizer, "betas" if rule == "adamw" else "momentum": own},
        "train.seed": which,
        "train.clip_norm": (0.5, 3.0, 100.0)[which],
        **{f"model.{name}": values[which] for name, values in VARIED[workload].items()},
    }


def three_trials(workload: type[Workload], rule: str, others: Values = NOTHING) -> list[Variant]:
    values = [numbers(workload, rule, which) for which in range(3)]
    steps = (STEPS, 260, 400)
    return [trial(workload, own | others, n) for own, n in zip(values, steps, strict=True)]


@cache
def fused(workload: type[Workload], rule: str) -> tuple[Program, list[Variant]]:
    """A program of three slots, and three trials for it."""
    trials = three_trials(workload, rule)
    return program_of(trials[0], **VARIED[workload]), trials


@cache
def wanted(workload: type[Workload], rule: str, which: int) -> tuple[list[float], list[State]]:
    return alone(fused(workload, rule)[1][which])


@dataclass
class Visit:
    """A trial's time in a slot, with its losses and its last state."""

    slot: int
    start: int
    stop: int
    who: int
    losses: list[float] = field(default_factory=list)
    row: TrialState | None = None


CHANGES = st.dictionaries(st.integers(0, STEPS - 1), st.sampled_from([0, 1, 2, None]), max_size=3)
"""Step -> the trial that takes a slot then, or None to free it."""


def visits(slot: int, changes: Mapping[int, int | None]) -> list[Visit]:
    stays = itertools.pairwise([*sorted(changes), STEPS])
    found = [(start, stop, changes[start]) for start, stop in stays]
    return [Visit(slot, start, stop, who) for start, stop, who in found if who is not None]


def play(program: Program, trials: Sequence[Variant], *guests: Visit) -> None:
    moments = sorted({moment for guest in guests for moment in (guest.start, guest.stop)})
    for begin, end in itertools.pairwise(moments):
        here = [guest for guest in guests if guest.start <= begin < guest.stop]
        for guest in here:
            if guest.start == begin:
                program.load_trial(guest.slot, trials[guest.who], built(trials[guest.who]))
        found = program.run([guest.slot for guest in here], end - begin)
        for column, guest in enumerate(here):
            guest.losses += [losses[column] for losses in found]
            if guest.stop == end:
                guest.row = program.state_of(guest.slot).copy()
                program.free(guest.slot)


def same_bits(row: TrialState | None, other: TrialState | None) -> bool:
    assert row is not None
    assert other is not None
    pairs = [
        (row.weights_P, other.weights_P),
        *zip(row.moments, other.moments, strict=True),
        *((row.buffers[name], other.buffers[name]) for name in row.buffers),
    ]
    return row.steps_done == other.steps_done and all(one.equal(two) for one, two in pairs)


def test_float64_columns_are_converted_as_in_a_trial_alone() -> None:
    """In float32. Only the model's inputs are: after a difference in float64."""
    variant = trial(Stamped, {"train.precision": "fp32"}, steps=12)
    program = program_of(variant, slots=2)
    program.load_trial(1, variant, built(variant))
    found = [losses[0] for losses in program.run([1], 12)]
    expected, _ = alone(variant, steps=12)
    assert found == pytest.approx(expected, rel=1e-5)
    ordinary = stepper(variant)
    moved = {**samples_of(variant)}
    moved["stamp"] = moved["stamp"] - 1.7e9  # the same differences, which float32 can tell
    there = TrainStep(variant.spec, variant.workload, moved, Worker(), 12)
    assert [ordinary.run(i).item() for i in range(3)] == pytest.approx(
        [there.run(i).item() for i in range(3)], rel=1e-5
    )


class TestATrialComputesWhatItComputesAlone:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("workload", VARIED)
    @settings(max_examples=3, deadline=None)
    @given(slots=st.permutations(range(3)), changes=st.tuples(CHANGES, CHANGES))
    def test_while_other_trials_come_and_go(
        self, workload: type[Workload], rule: str, slots: list[int], changes: Any
    ) -> None:
        program, trials = fused(workload, rule)
        beside = visits(slots[0], changes[0]) + visits(slots[1], changes[1])
        guests = [Visit(slots[2], 0, STEPS, 0), *beside]
        play(program, trials, *guests)
        for guest in guests:
            losses, states = wanted(workload, rule, guest.who)
            length = guest.stop - guest.start
            assert guest.losses == pytest.approx(losses[:length], rel=1e-9)
            assert guest.row is not None
            assert guest.row.steps_done == length
            assert_close(state_of(program.network_with(guest.row)), states[length])

    @pytest.mark.parametrize(
        ("workload", "still"),
        [
            (Half, {"used.0.0", "unused"}),
            (Words, set()),
            (Held, {"0.1"}),
            (Complex, {""}),
        ],
    )
    def test_with_untrained_weights(self, workload: type[Workload], still: set[str]) -> None:
        variant = trial(workload, {"optimizer.weight_decay": 0.5})
        program = program_of(variant)
        program.load_trial(2, variant, built(variant))
        program.run([2], 20)
        _, states = alone(variant, 20)
        found = state_of(program.network_with(program.state_of(2)))
        assert_close(found, states[20])
        same = {name.rpartition(".")[0] for name in found if found[name].equal(states[0][name])}
        assert same == still

    def test_up_to_a_gradient_that_is_not_finite(self) -> None:
        """Its weights are those of the step before, and the line is that of the trial alone."""
        variant = trial(Spoilt)
        program = program_of(variant)
        program.load_trial(1, variant, built(variant))
        found = [loss for (loss,) in program.run([1], 20)]
        ordinary, losses = stepper(variant), []
        with pytest.raises(TrainingError) as caught:
            losses += [ordinary.run(step).item() for step in range(20)]
        assert all(map(math.isnan, found[5:]))
        state = program.state_of(1)
        assert state.steps_done == 5
        assert state.buffers["seen"] == 5
        own = dict(ordinary.network.named_parameters())
        for name, value in program.network_with(state).named_parameters():
            torch.testing.assert_close(value, own[name], rtol=1e-9, atol=1e-9)
        line = not_finite(program.failed_loss(1), 6, found[4])
        assert str(caught.value).startswith(line)
        assert line.startswith("the gradient is not finite at step 6, though the loss is ")
        assert program.not_finite(state) == []
        state.weights_P[3] = math.inf
        assert program.not_finite(state) == ["0.0.weight"]


@dataclass(frozen=True)
class Compiled:
    program: Program
    trials: list[Variant]
    rows: tuple[TrialState, TrialState]
    """The same trial's state before and after compiling."""


STILL = {"model.blocks": (1,), "model.augment": 0.0}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((Points, "adamw", {}), id="points"),
        pytest.param((Vision, "sgd", STILL), id="vision", marks=pytest.mark.slow),
    ],
)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """PyTorch can compile the first one's step in place; not the second one's, on a CPU."""
    workload, rule, changes = request.param
    trials = three_trials(workload, rule, {"train.precision": "fp32", **changes})
    fixed = {name.partition(".")[2] for name in changes}
    varied = {name: values for name, values in VARIED[workload].items() if name not in fixed}
    program = program_of(trials[0], **varied)
    program.load_trial(1, trials[0], built(trials[0]))
    program.run([1], 3)
    before = program.state_of(1).copy()
    program.compile()
    return Compiled(program, trials, (before, program.state_of(1).copy()))


class TestACompiledTrialIsBitIdentical:
    def test_before_and_after_compiling(self, compiled: Compiled) -> None:
        assert same_bits(*compiled.rows)

    def test_and_close_to_the_trial_alone(self, compiled: Compiled) -> None:
        guest = Visit(2, 0, STEPS, 1)
        play(compiled.program, compiled.trials, guest)
        assert guest.losses == pytest.approx(alone(compiled.trials[1])[0], rel=1e-3)

    @settings(max_examples=8, deadline=None)
    @given(slots=st.permutations(range(3)), start=st.integers(0, 60), changes=CHANGES)
    def test_in_any_slot_from_any_step_beside_any_trial(
        self, compiled: Compiled, slots: list[int], start: int, changes: dict[int, int | None]
    ) -> None:
        guests = [Visit(slots[0], start, STEPS, 0), *visits(slots[1], changes)]
        play(compiled.program, compiled.trials, *guests)
        for guest in guests:
            lone = Visit(0, 0, guest.stop - guest.start, guest.who)
            play(compiled.program, compiled.trials, lone)
            assert guest.losses == lone.losses
            assert same_bits(guest.row, lone.row)

    def test_beside_one_that_diverges(self, compiled: Compiled) -> None:
        spec = compiled.trials[2].spec
        optimizer = spec.optimizer.model_copy(update={"lr": 1e38})
        mad = spec.model_copy(update={"optimizer": optimizer})
        trials = [*compiled.trials, Variant(mad, compiled.trials[2].workload, STEPS)]
        calm, beside = (Visit(1, 0, STEPS, 0) for _ in range(2))
        diverging = Visit(2, 5, STEPS, 3)
        play(compiled.program, trials, calm)
        play(compiled.program, trials, beside, diverging)
        assert beside.losses == calm.losses
        assert same_bits(beside.row, calm.row)
        assert diverging.row is not None
        done = diverging.row.steps_done
        assert 0 < done < 150
        assert not math.isfinite(diverging.losses[done])
        assert all(map(math.isnan, diverging.losses[done + 1 :]))
        until_then = Visit(0, 0, done, 3)
        play(compiled.program, trials, until_then)
        assert diverging.losses[:done] == until_then.losses
        assert same_bits(diverging.row, until_then.row)


@pytest.mark.parametrize("rule", RULES)
class TestATrialState:
    """A state that leaves a program, or enters one."""

    def test_continues_in_another_slot(self, rule: str) -> None:
        program, trials = fused(Points, rule)
        network = built(trials[0])
        program.load_trial(0, trials[0], network)
        program.run([0], 30)
        program.load_trial(2, trials[0], network, program.state_of(0).copy())
        program.run([0, 2], 30)
        assert same_bits(program.state_of(0), program.state_of(2))

    def test_continues_with_other_hyperparameters(self, rule: str, tmp_path: Path) -> None:
        """As from the other trial's checkpoint, which has no buffer without momentum."""
        program, trials = fused(Points, rule)
        giver, taker = stepper(trials[1]), stepper(trials[0])
        for step in range(30):
            giver.run(step)
        checkpoints = Checkpoints(tmp_path)
        giver.save(checkpoints, 30, {}, {}, lambda: None)
        checkpoints.wait()
        taker.resume(checkpoints)
        program.load_trial(0, trials[1], built(trials[1]))
        program.run([0], 30)
        program.load_trial(1, trials[0], built(trials[0]), program.state_of(0).copy())
        found = [loss for (loss,) in program.run([1], 30)]
        assert found == pytest.approx([taker.run(30 + i).item() for i in range(30)], rel=1e-9)

    @pytest.mark.parametrize("workload", [Pictures, Text])
    def test_is_saved_and_resumed_as_an_ordinary_checkpoint(
        self, rule: str, workload: type[Workload], tmp_path: Path
    ) -> None:
        program, trials = fused(workload, rule)
        program.load_trial(2, trials[0], built(trials[0]))
        program.run([2], 30)
        row, checkpoints = program.state_of(2).copy(), Checkpoints(tmp_path)
        checkpoints.save(row.steps_done, program.network_with(row), program.optimizer)
        checkpoints.wait()
        ordinary = stepper(trials[0])
        assert ordinary.resume(checkpoints) == (30, {})
        assert same_bits(program.state_from(ordinary.network, ordinary.optimizer, 30), row)
        losses = [ordinary.run(step).item() for step in range(30, 60)]
        assert losses == pytest.approx(wanted(workload, rule, 0)[0][30:60], rel=1e-9)

    def test_becomes_a_network_with_the_floats_of_its_trial(self, rule: str) -> None:
        program, trials = fused(Points, rule)
        program.load_trial(0, trials[1], built(trials[1]))
        network = program.network_with(program.state_of(0)).eval()
        x = SAMPLES[Points]["x"].double()
        assert network(x).equal(built(trials[1]).eval()(x))
