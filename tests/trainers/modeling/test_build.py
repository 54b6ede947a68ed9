"""What is refused before a model trains, and what its parts are tried out for."""

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel

from cluster.base.errors import SpecError, TrainingError
from tests.trainers.modeling.users_models import Base, Parts, Tied
from trainers.modeling import build
from trainers.modeling.build import build_model
from trainers.modeling.dropout import key_dropout_by_sample
from trainers.modeling.operations import OperationCounter
from trainers.modeling.strategy import _split_layers
from trainers.spec import RunSpec
from trainers.worker import Worker

SPEC = RunSpec.model_validate({"workload": "x", "train": {"precision": "fp64"}})


def columns(workload: Base, split: str = "train") -> dict[str, Tensor]:
    return {name: torch.from_numpy(of) for name, of in workload.columns()[split].items()}


class LateParts(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.late: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Linear(3, 3)
        return self.late(super().forward(x))  # type: ignore[no-any-return]


class Late(Base):
    def build(self) -> nn.Module:
        return LateParts()


def test_parameters_that_the_forward_pass_makes_are_refused_in_a_line() -> None:
    workload = Late(None, None)
    spec = RunSpec.model_validate({"workload": "x"})
    model = build_model(spec, workload, columns(workload), Worker())
    loss = model.compiled({"x": torch.ones(5, 8), "y": torch.ones(5, 3)}).sum()
    message = r"^the workload's build must make all parameters .*has made late\.weight\)$"
    with pytest.raises(TrainingError, match=message):
        model.backward(loss, last=True)


class DrawingParts(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = random.random() + np.random.rand() + torch.rand(())
        return self.head(self.drop(self.norm(torch.tanh(self.encoder(x)))) + noise)


class Drawing(Base):
    seen = 0

    def build(self) -> nn.Module:
        return DrawingParts()

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        self.seen += 1
        return super().forward(model, batch)


def test_trying_out_leaves_no_trace() -> None:
    workload = Drawing(None, None)
    network = workload.build()
    key_dropout_by_sample(network)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    samples = columns(workload)
    before = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index, union-attr]
    operations = OperationCounter()
    shapes = build._try_out(workload, network, samples, operations)
    after = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index, union-attr]
    assert shapes == {"drop": {(1, 6)}}
    assert operations.per_sample == 2 * (2 * 8 * 6 + 3 * 6 * 3)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert workload.seen == 0
    assert isinstance(network, DrawingParts)
    assert network.calls == 0
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_a_model_that_cannot_be_tried_out_is_not_known() -> None:
    workload = Tied(None, None)
    network = workload.build()
    samples = columns(workload)
    del samples["token"]
    assert build._try_out(workload, network, samples, OperationCounter()) is None


def test_the_operations_of_the_first_step_alone_are_counted() -> None:
    workload = Base(None, None)
    model = build_model(SPEC, workload, columns(workload), Worker())
    batch = {"x": torch.ones(5, 8).double(), "y": torch.ones(5, 3).double()}
    counting = functools.partial(model.counting_operations, samples=5)
    for step, micro_batch in ((1, 0), (0, 1)):
        with counting(step, micro_batch):
            model.backward(model.compiled(batch).sum(), last=True)
        assert model.operations.per_sample is None
    with counting(0, 0):
        model.backward(model.compiled(batch).sum(), last=True)
    assert model.operations.per_sample == 2 * (2 * 8 * 6 + 3 * 6 * 3)


def test_tensor_parallelism_does_not_part_shared_weights(tmp_path: Path) -> None:
    class Split(Tied):
        def tensor_plan(self, model: nn.Module) -> dict[str, Any]:
            return {"head": ColwiseParallel()}

    workload = Split(None, None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        group = init_device_mesh("cpu", (1,))
        message = r"^scale\.parallel: tensor cannot split embedding\.weight and head\.weight, which"
        with pytest.raises(SpecError, match=message):
            _split_layers(workload.build(), group, workload)
    finally:
        dist.destroy_process_group()
