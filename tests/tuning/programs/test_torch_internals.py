"""The private parts of PyTorch that programs use are still as they were read."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuning.programs.torch_internals import (
    COMPILE_OPTIONS,
    READ_IN,
    compile_graph,
    node_bytes,
    trace_operations,
    with_backward_hooks,
)


def parameters_of_standalone_compile() -> set[str]:
    from torch._inductor import standalone_compile

    return {*inspect.signature(standalone_compile).parameters}


def options_of_inductor() -> set[str]:
    return {*torch._inductor.list_options()}


def double_in_place(state: Tensor, batch: Tensor) -> Tensor:
    new = torch.vmap(lambda row: row * 2)(state)
    state.copy_(new)
    return (state + batch).sum()


def traced_operations() -> list[str]:
    graph = trace_operations(double_in_place, [torch.ones(2, 3), torch.ones(2, 3)])
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def bytes_of_traced_nodes() -> list[int]:
    graph = trace_operations(double_in_place, [torch.ones(2, 3), torch.ones(2, 3)])
    return [node_bytes(node) for node in graph.graph.nodes if node.op != "output"]


def hooked() -> list[str | None]:
    """Who has backward hooks, for each way to register one, and after its removal."""
    network = nn.Sequential(nn.Linear(1, 1))
    linear, everywhere = network[0], nn.modules.module
    ways: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (linear.weight.register_hook, lambda gradient: gradient),
        (linear.bias.register_post_accumulate_grad_hook, lambda weight: None),
        (linear.register_full_backward_hook, lambda *_: None),
        (linear.register_full_backward_pre_hook, lambda *_: None),
        (network.register_full_backward_hook, lambda *_: None),
        (everywhere.register_module_full_backward_hook, lambda *_: None),
        (everywhere.register_module_full_backward_pre_hook, lambda *_: None),
    ]
    found = []
    for register, hook in ways:
        handle = register(hook)
        found.append(with_backward_hooks(network))
        handle.remove()
        assert with_backward_hooks(network) is None
    return found


ITEMS: dict[str, Callable[[], Any]] = {
    "make_fx traces through vmap to aten operations, with copy_ in place": lambda: (
        traced_operations()
        == ["aten.mul.Tensor", "aten.copy_.default", "aten.add.Tensor", "aten.sum.default"]
    ),
    "make_fx notes each result's shape and dtype in node.meta['tensor_meta']": lambda: (
        bytes_of_traced_nodes() == [24, 24, 24, 24, 24, 4]
    ),
    "backward hooks are in attributes of parameters, of modules and of torch.nn": lambda: (
        hooked() == ["0.weight", "0.bias", "0", "0", "the model", "every module", "every module"]
    ),
    "torch._inductor.standalone_compile takes dynamic_shapes and options": lambda: (
        parameters_of_standalone_compile() >= {"dynamic_shapes", "options"}
    ),
    f"Inductor has the options {', '.join(COMPILE_OPTIONS)}": lambda: (
        options_of_inductor() >= {*COMPILE_OPTIONS}
    ),
}


def changed(item: str) -> str:
    return (
        f"not true any more of PyTorch {torch.__version__}: {item} (read in PyTorch {READ_IN}; "
        "see tuning/programs/torch_internals.py)"
    )


@pytest.mark.parametrize("item", ITEMS)
def test_pytorch_has(item: str) -> None:
    assert ITEMS[item](), changed(item)


def test_a_compiled_graph_changes_its_inputs_in_place() -> None:
    state, batch = torch.ones(2, 3), torch.ones(2, 3)
    graph = trace_operations(double_in_place, [state.clone(), batch])
    with torch.no_grad():
        step = compile_graph(graph, [state, batch])
        total = step(state, batch)
    assert total.item() == 18, changed("standalone_compile returns what the graph returns")
    assert state.equal(torch.full((2, 3), 2.0)), changed("standalone_compile keeps copy_")
