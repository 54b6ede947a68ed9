"""float64 and complex columns: workloads get what the columns hold, models what they compute in."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.state import load_model_weights
from trainers.counter_rng import combine_seeds
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import epoch_permutation
from trainers.data.splits import open_split
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.modeling.model_inputs import MixedDtypes, convert_inputs, mixed_dtypes
from trainers.spec import RunSpec, resolve
from trainers.workload import Workload

SOURCE = '''
"""Events with time stamps, identifiers and wide features."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trainers import Spec, Workload, table


class Network(nn.Module):
    """Layers, a weight of its own, and parts that are called by themselves."""

    def __init__(self):
        super().__init__()
        self.inside = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.Tanh())])
        self.recurrent = nn.GRU(4, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.last = nn.Linear(6, 1)
        self.own = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 6))

    def encode(self, x):
        return torch.tanh(x @ self.own)

    def forward(self, x):
        return self.last(self.inside[0](x))[:, 0]


class Events(Workload):
    class Data(Spec):
        rows: int = 48

    class Model(Spec):
        call: str = "whole"
        loss: str = "mse"

    def dataset(self):
        def split(rows, seed):
            random = np.random.default_rng(seed)
            stamp = 1.7e9 + np.cumsum(random.exponential(4.93, (rows, 5)), axis=1)
            x = random.normal(size=(rows, 4))
            return table(
                stamp=stamp,
                x=x,
                y=np.sin(x.sum(1)),
                name=2**53 + 1 + 2 * np.arange(rows),
                phase=x + 1j * random.normal(size=x.shape),
                half=random.normal(size=rows).astype(np.float16),
            )

        return {"train": split(self.data.rows, 0), "val": split(30, 1)}

    def build(self):
        return Network()

    def augment(self, batch, random):
        assert batch["stamp"].dtype == torch.float64
        return batch

    def forward(self, model, batch):
        x, call = batch["x"], self.model.call
        if call == "keyword":
            return model(x=x)
        if call == "part":
            return model.last(model.inside[0](x))[:, 0]
        if call == "recurrent":
            return model.last(model.recurrent(x[:, None])[0][:, 0])[:, 0]
        if call == "normalised":
            return model.last(model.norm(model.inside[0](x)))[:, 0]
        if call == "method":
            return model.last(model.encode(x))[:, 0]
        if call == "weight":
            return (torch.tanh(x @ model.own) @ model.last.weight.T)[:, 0]
        if call == "complex":
            return (batch["phase"] @ model.own.to(torch.complex64)).abs().sum(1) + model(x)
        if call == "gaps":  # a difference of stamps that float32 cannot tell from each other
            return model(batch["stamp"].diff(dim=1))
        return model(x)

    def loss(self, output, batch):
        y = batch["y"]
        if self.model.loss == "huber":
            return F.huber_loss(output, y, reduction="none")
        if self.model.loss == "bce":
            return F.binary_cross_entropy(output.sigmoid(), (y > 0).double(), reduction="none")
        return F.mse_loss(output, y, reduction="none")

    def metrics(self, output, batch):
        return {
            "gap": batch["stamp"].diff(dim=1).mean(1),
            "odd": (batch["name"] % 2).double(),
            "phase": batch["phase"].imag.mean(1),
            "half": batch["half"],
        }
'''
STEPS, BATCH = 6, 16


@pytest.fixture
def events(own_folder: Path) -> Callable[..., tuple[RunSpec, Workload]]:
    (own_folder / "events.py").write_text(SOURCE)

    def resolved(**sections: dict[str, Any]) -> tuple[RunSpec, Workload]:
        sys.modules.pop("events", None)
        data = {
            "workload": "events:Events",
            "optimizer": {
                "name": "sgd",
                "lr": 0.1,
                "momentum": 0.0,
                "weight_decay": 0.0,
                "schedule": {"name": "constant", "warmup": 0.0},
            },
            **sections,
        }
        data["train"] = {"steps": STEPS, "global_batch": BATCH, **sections.get("train", {})}
        return resolve(data, RunSpec)

    return resolved


def trained(folder: Path, spec: RunSpec, workload: Workload) -> tuple[nn.Module, dict[str, float]]:
    """The network after training, and its metrics."""
    outcome = train(
        spec, workload, prepare_dataset(workload, folder), folder / "run", NullReporter()
    )
    newest = Checkpoints(folder / "run" / "checkpoints").latest()
    assert newest is not None
    network = workload.build()
    load_model_weights(newest, network)
    return network, outcome.metrics


def plain_loop(
    split: dict[str, Tensor],
    network: nn.Module,
    forward: Callable[[Any, dict[str, Tensor]], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> nn.Module:
    """The same training without Heliostat; inputs are converted by hand."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    order = torch.cat([epoch_permutation(0, epoch, 48) for epoch in range(3)])
    for step in range(STEPS):
        index = order[step * BATCH : (step + 1) * BATCH]
        batch = {name: values[index] for name, values in split.items()}
        optimizer.zero_grad()
        loss(forward(network, batch), batch["y"]).mean().backward()
        optimizer.step()
    return network


def by_hand(call: str) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].float()
        hidden = model.inside[0](x)
        if call == "recurrent":
            hidden = model.recurrent(x[:, None])[0][:, 0]
        elif call == "normalised":
            hidden = model.norm(hidden)
        elif call in ("method", "weight"):
            hidden = torch.tanh(x @ model.own)
        elif call == "gaps":
            hidden = model.inside[0](batch["stamp"].diff(dim=1).float())
        if call == "weight":
            return (hidden @ model.last.weight.T)[:, 0]
        found: Tensor = model.last(hidden)[:, 0]
        if call == "complex":
            phase = batch["phase"].to(torch.complex64)
            found = found + (phase @ model.own.to(torch.complex64)).abs().sum(1)
        return found

    return forward


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda output, y: (output - y).square(),
    "huber": lambda output, y: F.huber_loss(output, y.float(), reduction="none"),
    "bce": lambda output, y: F.binary_cross_entropy(
        output.sigmoid(), (y > 0).float(), reduction="none"
    ),
}
CALLS = [
    "whole",
    "keyword",
    "part",
    "recurrent",
    "normalised",
    "method",
    "weight",
    "complex",
    "gaps",
]


@pytest.mark.parametrize(
    ("call", "loss"), [*((call, "mse") for call in CALLS), ("whole", "huber"), ("whole", "bce")]
)
def test_training_is_that_of_a_loop_that_converts_the_inputs(
    own_folder: Path, events: Callable[..., tuple[RunSpec, Workload]], call: str, loss: str
) -> None:
    spec, workload = events(model={"call": call, "loss": loss})
    network, _ = trained(own_folder, spec, workload)
    split = open_split(prepare_dataset(workload, own_folder), "train")
    torch.manual_seed(combine_seeds(0))
    expected = plain_loop(split, workload.build(), by_hand(call), LOSSES[loss])
    for name, wanted in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("section", [{}, {"precision": "bf16"}, {"precision": "fp64"}])
def test_metrics_are_computed_from_what_the_columns_hold(
    own_folder: Path, events: Callable[..., tuple[RunSpec, Workload]], section: dict[str, Any]
) -> None:
    """Gaps between stamps of the present, for which float32 has steps of 128 s."""
    spec, workload = events(train=section)
    _, metrics = trained(own_folder, spec, workload)
    val = workload.dataset()["val"]
    raw = {field.name: field.metadata for field in val.schema}
    stamp = np.frombuffer(b"".join(val["stamp"].to_pylist()), np.float64).reshape(30, 5)
    phase = np.frombuffer(b"".join(val["phase"].to_pylist()), raw["phase"][b"dtype"].decode())
    assert metrics["val/gap"] == pytest.approx(np.diff(stamp, axis=1).mean(), rel=1e-12)
    assert metrics["val/odd"] == 1
    assert metrics["val/phase"] == pytest.approx(phase.imag.mean(), rel=1e-12)
    assert metrics["val/half"] == pytest.approx(
        val["half"].to_numpy().astype(np.float64).mean(), rel=1e-6
    )


def wide(rows: int = 3) -> dict[str, Tensor]:
    return {"x": torch.ones(rows, 4, dtype=torch.float64)}


class TestConvertInputs:
    def test_without_a_wide_column_a_network_is_left_alone(self) -> None:
        network = nn.Sequential(nn.Linear(4, 2))
        convert_inputs(network, {"x": torch.ones(2, 4), "i": torch.ones(2).long()}, torch.float32)
        with pytest.raises(RuntimeError):
            network(wide()["x"])

    def test_so_is_one_that_computes_in_float64(self) -> None:
        network = nn.Sequential(nn.Linear(4, 2)).double()
        convert_inputs(network, wide(), torch.float64)
        assert network(wide()["x"]).dtype == torch.float64

    def test_a_network_with_a_wide_buffer_gets_wide_inputs(self) -> None:
        """One that knows what to do with time stamps."""

        class Since(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("start", torch.tensor(1.7e9, dtype=torch.float64))
                self.layer = nn.Linear(1, 1)

            def forward(self, stamp: Tensor) -> tuple[Tensor, Tensor]:
                since = stamp - self.start
                return since, self.layer(since)

        network = Since()
        stamps = torch.tensor([[1.7e9 + 4.93]], dtype=torch.float64)
        convert_inputs(network, {"stamp": stamps}, torch.float32)
        since, output = network(stamps)
        assert since.item() == pytest.approx(4.93, rel=1e-6)
        assert output.dtype == torch.float32

    def test_inputs_are_converted_wherever_they_are(self) -> None:
        class Seen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(1))

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return args, kwargs

        network, x = Seen(), wide()["x"]
        for _ in range(2):  # the second time changes nothing
            convert_inputs(network, wide(), torch.float32)
        args, kwargs = network({"a": [x, (x.long(), x)]}, z=x + 1j, half=x.half(), text="t")
        assert args[0]["a"][0].dtype == args[0]["a"][1][1].dtype == torch.float32
        assert args[0]["a"][1][0].dtype == torch.int64
        assert kwargs["z"].dtype == torch.complex64
        assert kwargs["half"].dtype == torch.float16
        assert kwargs["text"] == "t"


class TestWhatTheFirstPassShows:
    """Later passes pay only for what the first one needed."""

    @staticmethod
    def layered() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
        convert_inputs(network, wide(), torch.float32)
        return network

    def test_layers_that_convert_nothing_are_left_alone(self) -> None:
        network = self.layered()
        x = wide()["x"]
        with mixed_dtypes(network):
            assert network(x).dtype == network[0](x).dtype == torch.float32
        assert network(x).dtype == network[0](x).dtype == torch.float32
        with pytest.raises(RuntimeError):
            network[2](x)
        assert isinstance(mixed_dtypes(network), contextlib.nullcontext)

    def test_evaluation_has_a_first_pass_of_its_own(self) -> None:
        network = self.layered()
        x = wide()["x"]
        with mixed_dtypes(network):
            network(x)
        for _ in range(2):
            with torch.no_grad(), mixed_dtypes(network):
                assert (x @ network[0].weight).dtype == torch.float32
        with mixed_dtypes(network), pytest.raises(RuntimeError):
            x @ network[0].weight

    def test_functions_that_mixed_dtypes_do_so_again(self) -> None:
        network = self.layered()
        x = wide()["x"]
        for _ in range(3):
            with mixed_dtypes(network):
                assert (x @ network[0].weight).dtype == torch.float32

    def test_a_compiled_network_is_not_changed(self) -> None:
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        convert_inputs(network, wide(), torch.float32, compiled=True)
        x = wide()["x"]
        for _ in range(2):
            with mixed_dtypes(network):
                network(x)
        assert network[1](x).dtype == torch.float32

    def test_without_wide_columns_there_is_no_context(self) -> None:
        assert isinstance(mixed_dtypes(nn.Linear(4, 1)), contextlib.nullcontext)


class TestMixedDtypes:
    @pytest.mark.parametrize(
        "mix",
        [
            lambda narrow, wide: narrow @ wide.T,
            lambda narrow, wide: torch.cdist(narrow, wide),
            lambda narrow, wide: torch.einsum("ij,ij->i", narrow, wide),
            lambda narrow, wide: F.binary_cross_entropy(narrow.sigmoid(), wide, reduction="none"),
            lambda narrow, wide: F.huber_loss(narrow, wide, reduction="none"),
            lambda narrow, wide: torch.lerp(narrow, wide, 0.5),
            lambda narrow, wide: torch.linalg.multi_dot([narrow, wide.T]),
        ],
    )
    def test_what_pytorch_refuses_is_done_in_the_narrower_dtype(
        self, mix: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        narrow = torch.rand(3, 4, requires_grad=True)
        values = torch.rand(3, 4, dtype=torch.float64)
        with pytest.raises(RuntimeError):
            mix(narrow, values).sum().backward()
        with MixedDtypes():
            found = mix(narrow, values)
        found.sum().backward()
        assert found.dtype == torch.float32
        assert torch.equal(found, mix(narrow, values.float()))

    def test_what_pytorch_does_stays_as_it_is(self) -> None:
        values = torch.tensor([1.7e9 + 4.93], dtype=torch.float64)
        with MixedDtypes():
            assert (values - torch.tensor(1.7e9)).item() == pytest.approx(4.93, rel=1e-6)

    def test_other_errors_are_raised(self) -> None:
        with MixedDtypes(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            torch.ones(2, 5) @ wide()["x"]
