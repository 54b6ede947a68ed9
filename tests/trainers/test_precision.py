"""An unsupported precision is reported in one line; fp8 layers train."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cluster.base.errors import SpecError
from trainers.devices import Cpu, Cuda
from trainers.precision import check_precision, convert_to_fp8


def test_an_unsupported_precision_is_reported_with_the_supported_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    check_precision("fp16", Cuda())
    with pytest.raises(SpecError) as error:
        check_precision("bf16", Cuda())
    assert (
        str(error.value) == "train.precision: Tesla T4 does not support bf16, only fp32, fp64, fp16"
    )


def test_fp8_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"^train.precision: fp8 needs the package torchao"):
        check_precision("fp8", Cpu())
    check_precision("bf16", Cpu())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_a_cpu_computes_in_the_precisions_that_it_lists(precision: str, dtype: torch.dtype) -> None:
    check_precision(precision, Cpu())
    a = torch.randn(16, 16)
    with torch.autocast("cpu", dtype):
        product = a @ a
    assert product.dtype == dtype
    assert torch.allclose(product.float(), a @ a, atol=0.2)


def test_fp8_layers_keep_their_weights_and_learn() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    network = convert_to_fp8(network)
    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == ["Float8Linear", "ReLU", "Float8Linear", "Linear"]

    x, label = torch.randn(5, 16), torch.tensor([0, 1, 2, 1, 0])  # 5 is no multiple of 16
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(network(x), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
