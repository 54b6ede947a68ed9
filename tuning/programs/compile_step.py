"""Compiles a traced step; on a GPU, captures it as a CUDA graph."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.fx import GraphModule

from cluster.base.files import cache_folder
from tuning.programs.measurements import graph_key
from tuning.programs.torch_internals import compile_graph
from tuning.programs.vmap_rewrites import NotFusibleError, first_sentence

CompiledStep = Callable[..., Tensor]
"""Takes the state, which it changes in place, then the inputs; returns what `SlotStep` does."""


def compile_step(graph: GraphModule, inputs: Sequence[Tensor], state_count: int) -> CompiledStep:
    """Compile a traced step, whose first `state_count` inputs are the state that it changes.

    Takes from two seconds to a minute. On a GPU the step is one CUDA graph, bound to the tensors
    of the state. Raises NotFusibleError if PyTorch cannot compile it.
    """
    with torch.no_grad():
        try:
            step = _compiled(graph, inputs)
        except NotFusibleError:
            # PyTorch 2.13 on a CPU: a KeyError, where a loop overwrites what it has read
            # (github.com/pytorch/pytorch/issues/188228).
            step = _copying_back(_compiled(_out_of_place(graph), inputs), state_count)
        on_gpu = inputs[0].device.type == "cuda"
        return _CudaGraphStep(step, inputs, state_count) if on_gpu else step


def _compiled(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    try:
        # Engines of one machine compile the same program: only the first one has to, the others
        # find it in Inductor's cache on disk.
        key = graph_key(graph, inputs[0].device)
        with FileLock(cache_folder() / f"compile-{key[:16]}.lock"):
            return compile_graph(graph, inputs)
    except Exception as error:
        raise NotFusibleError(f"torch.compile: {first_sentence(error)}") from error


def _out_of_place(graph: GraphModule) -> GraphModule:
    """The step with the new state among its results, after the losses, instead of in place."""
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


def _copying_back(step: Callable[..., Any], state_count: int) -> CompiledStep:
    """A step made by `_out_of_place`, which changes the state in place again."""

    def stepped(*inputs: Tensor) -> Tensor:
        found_2K: Tensor
        found_2K, *new = step(*inputs)
        for old, value in zip(inputs[:state_count], new, strict=True):
            old.copy_(value)
        return found_2K

    return stepped


class _CudaGraphStep:
    """A compiled step as one CUDA graph: one command of the host per step. Not tried on a GPU."""

    def __init__(
        self, step: Callable[..., Any], inputs: Sequence[Tensor], state_count: int
    ) -> None:
        """The state's tensors stay where they are; the other inputs are copied into fixed ones."""
        held, rest = inputs[:state_count], inputs[state_count:]
        self._inputs, self._state_count = [*held, *(value.clone() for value in rest)], state_count
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # the warm-up that PyTorch's documentation advises
                step(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._found_2K = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        own = self._inputs[self._state_count :]
        for held, new in zip(own, inputs[self._state_count :], strict=True):
            held.copy_(new)
        self._graph.replay()
        found_2K: Tensor = self._found_2K.clone()
        return found_2K
