"""PyTorch's private parts are as `trainers.torch_internals` takes them to be, release 2.13.0.

A test that fails says which part another release has changed; what to do is written there.
"""

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from trainers import torch_internals


def test_the_keys_of_shards_are_those_of_torchs_own_writer(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save(
            {"weight": torch.ones(2, 3)},
            storage_writer=HuggingFaceStorageWriter(str(tmp_path), save_distributed=True),
            no_dist=True,
        )
    [path] = tmp_path.rglob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert torch_internals.SHARDING_INFO_KEY in metadata, "HuggingFaceStorageWriter: other metadata"
    shards = json.loads(metadata[torch_internals.SHARDING_INFO_KEY])
    assert shards["weight"][torch_internals.SAVED_OFFSETS_KEY] == [0, 0], (
        "HuggingFaceStorageWriter: other entries of a shard"
    )


def test_the_logger_of_distributed_checkpointing_has_its_name() -> None:
    import torch.distributed.checkpoint.logger as dcp

    name = torch_internals._DCP_LOGGER
    assert dcp._dcp_logger.name == name, f"torch.distributed.checkpoint: no logger {name}"
    torch_internals.quiet_checkpoint_log()
    assert not dcp._dcp_logger.isEnabledFor(logging.INFO)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})],
)
def test_optimizers_without_guards_are_pytorchs_own(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    ours = torch_internals.without_compile_guards(kind)
    assert ours.__name__ == kind.__name__, "checkpoints hold the name"
    networks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    networks[1].load_state_dict(networks[0].state_dict())
    for network, optimizer_type in zip(networks, (kind, ours), strict=True):
        optimizer = optimizer_type(network.parameters(), lr=0.1, fused=True, **options)
        for step in range(3):
            network(torch.full((2, 4), step + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert network.weight.grad is None
    assert networks[0].weight.equal(networks[1].weight)
    assert networks[0].bias.equal(networks[1].bias)


def test_operations_are_noted_with_those_of_the_backward_pass() -> None:
    seen: list[Any] = []
    x, weight = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True)
    with torch_internals.noting_operations(lambda *each: seen.append(each)):
        torch.mm(x, weight).sum().backward()
    products = [each for each in seen if each[0] is torch.ops.aten.mm]
    assert len(products) == 2, "TorchDispatchMode: other operations"
    (_, inputs, result), _ = products
    assert inputs[1] is weight, "TorchDispatchMode: other tensors"
    assert result.shape == (2, 5)


def test_noting_operations_does_not_import_dynamo() -> None:
    code = (
        "import sys, torch; from trainers.torch_internals import noting_operations\n"
        "with noting_operations(lambda *_: None): torch.ones(2, 2) @ torch.ones(2)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_formulas_get_shapes_and_the_result_as_out_val() -> None:
    formula = torch_internals.flop_formulas()[torch.ops.aten.mm]
    x, weight = torch.ones(2, 3), torch.ones(3, 5)
    assert formula(x, weight, out_val=x @ weight) == 2 * 2 * 3 * 5, "flop_registry: other formulas"


def test_the_time_of_compiling_is_counted() -> None:
    before = torch_internals.compile_time_s()
    torch.compile(lambda x: x.sin() + before, backend="eager")(torch.ones(3))
    assert torch_internals.compile_time_s() > before, "torch._dynamo.utils.calculate_time_spent"


def test_the_setting_for_compiled_checkpoints_is_there() -> None:
    import torch._dynamo

    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    assert hasattr(torch._dynamo.config, name), f"torch._dynamo.config: no {name}"
    with torch._dynamo.config.patch({name: False}):
        torch_internals.allow_dropout_in_compiled_checkpoints()
        assert getattr(torch._dynamo.config, name)


class Half(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_unused_parameters_of_a_sharded_model_are_noted(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = Half()
        fully_shard(model).set_reduce_scatter_unused_params(True)
        with torch_internals.noting_used_shards() as (used, unused):
            model(torch.ones(1, 2)).sum().backward()
        assert used == {model.used.weight, model.used.bias}, "FSDPParam: other gradients"
        assert unused == {model.idle.weight, model.idle.bias}, "FSDPParam: other zeros"
        assert all(weight.grad is not None for weight in model.parameters())
    finally:
        dist.destroy_process_group()


def test_a_shard_that_is_taken_for_a_weight_is_told_in_these_words(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = Half()
        fully_shard(model)
        with pytest.raises(RuntimeError) as caught:
            torch.mm(torch.ones(1, 2), model.used.weight)
    finally:
        dist.destroy_process_group()
    assert torch_internals.is_shard_taken_for_whole(caught.value), (
        f"DTensor: another message: {caught.value}"
    )
    assert not torch_internals.is_shard_taken_for_whole(RuntimeError("another"))


def test_operations_that_take_functions() -> None:
    from torch._higher_order_ops.cond import cond_op

    assert torch_internals.takes_functions(cond_op)
    assert not torch_internals.takes_functions(torch.ops.aten.mm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_the_scalers_kernel_finds_what_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    tensors = [torch.arange(5, dtype=dtype), torch.full((2, 3), 1e-38, dtype=dtype)]
    tensors[1][1, 2] += bad
    before = [tensor.clone() for tensor in tensors]
    found = torch.zeros(())
    torch_internals.mark_not_finite(tensors, found, torch.ones(()))
    assert found.item() == (bad != 0.0), "torch._amp_foreach_non_finite_check_and_unscale_"
    for tensor, value in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, value, rtol=0, atol=0, equal_nan=True)
