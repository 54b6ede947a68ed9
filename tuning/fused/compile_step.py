"""A traced step compiled, and on a GPU captured."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.fx import GraphModule

from cluster.base.files import cache_folder
from tuning.fused.vmap_rewrites import NotFusibleError, first_sentence

CompiledStep = Callable[..., Tensor]
"""Takes the state, which it changes in place, and the inputs; gives the losses."""


def compile_step(graph: GraphModule, inputs: Sequence[Tensor], state_count: int) -> CompiledStep:
    """A traced step as a compiled one; the first `state` of its inputs are what it changes.

    Takes from two seconds to a minute. On a GPU the step is one CUDA graph, which belongs to the
    state's tensors. Raises NotFusibleError where PyTorch cannot compile it.
    """
    with torch.no_grad():
        try:
            step = _compiled(graph, list(inputs))
        except NotFusibleError:
            # PyTorch 2.13 on a CPU: a KeyError, where a loop overwrites what it has read
            # (github.com/pytorch/pytorch/issues/188228).
            step = _copying_back(_compiled(_out_of_place(graph), list(inputs)), state_count)
        return (
            _CudaGraphStep(step, inputs, state_count) if inputs[0].device.type == "cuda" else step
        )


def _compiled(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch._inductor import standalone_compile

    # Convolutions of one slot, in another layout, end the process (PyTorch 2.13 on a CPU);
    # those of several are grouped, and keep their layout anyway.
    # Trying whether the compiler knows the processor's instructions takes six seconds.
    options = {"config_patches": {"layout_optimization": False, "cpp.vec_isa_ok": True}}
    try:
        # Engines of one machine compile the same: all but the first then find it on the disk.
        with FileLock(cache_folder() / "compile.lock"):
            return standalone_compile(
                graph, inputs, dynamic_shapes="from_example_inputs", options=options
            )
    except Exception as error:
        raise NotFusibleError(f"torch.compile: {first_sentence(error)}") from error


def _out_of_place(graph: GraphModule) -> GraphModule:
    """A step that gives the new state after the losses, and leaves the old one as it is."""
    changed = copy.deepcopy(graph)
    *nodes, output = changed.graph.nodes
    copies = [
        node
        for node in nodes
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"
    ]
    output.args = ((*output.all_input_nodes, *(node.args[1] for node in copies)),)
    for node in copies:
        changed.graph.erase_node(node)
    changed.recompile()
    return changed


def _copying_back(step: Callable[..., Any], state: int) -> Callable[..., Any]:
    def stepped(*inputs: Tensor) -> Tensor:
        loss_K: Tensor
        loss_K, *new = step(*inputs)
        for old, value in zip(inputs[:state], new, strict=True):
            old.copy_(value)
        return loss_K

    return stepped


class _CudaGraphStep:
    """A compiled step as one CUDA graph: the host gives one command per step. Not tried on one."""

    def __init__(self, step: Callable[..., Any], inputs: Sequence[Tensor], state: int) -> None:
        """The first `state` of the inputs stay where they are; the others are copied in."""
        self._inputs, self._state = [*inputs[:state], *(i.clone() for i in inputs[state:])], state
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # PyTorch's own advice: libraries set themselves up
                step(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss_K = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for held, new in zip(self._inputs[self._state :], inputs[self._state :], strict=True):
            held.copy_(new)
        self._graph.replay()
        loss_K: Tensor = self._loss_K.clone()
        return loss_K
