"""All that fusing uses of PyTorch and that PyTorch does not promise to keep.

Read in PyTorch 2.13.0. `tests/tuning/programs/test_torch_internals.py` checks each item, and says
which one has changed. What else looks unusual in this room is documented: `torch.vmap`,
`torch.func.functional_call`, `torch.overrides.TorchFunctionMode` and the `vmap` rule of a
`torch.autograd.Function`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

READ_IN = "2.13.0"
COMPILE_OPTIONS = {
    # With the layout pass, convolutions of a single slot end the process (CPU). Those of several
    # slots are grouped, and keep their layout anyway.
    "layout_optimization": False,
    # The test whether the compiler knows the processor's instructions takes six seconds.
    "cpp.vec_isa_ok": True,
    # A value of more operations than this, used more than once, is kept instead of computed again.
    # The hashes of dropout then are in one kernel each. With the default of 50, generating the
    # code of a small MLP took three times as long; with 10, its step took 1.2 times as long.
    "realize_cpu_opcount_threshold": 25,
}
"""Options of Inductor, which `torch._inductor.list_options` lists without promising any."""


def trace_operations(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """The operations that `function` runs on `inputs`, below autograd and vmap.

    `make_fx` is in `torch.fx.experimental`. The public `torch.export` and `torch.compile` go
    through Dynamo, whose limits the user's code would then meet.
    """
    graph: GraphModule = make_fx(function)(*inputs)
    return graph


def with_backward_hooks(network: nn.Module) -> str | None:
    """The name of a parameter or module that has hooks on its backward pass; None if none has.

    PyTorch lets hooks be added and removed, but not be seen.
    """
    everywhere = torch.nn.modules.module
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        return "every module"
    for name, module in network.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            return name or "the model"
    for name, weight in network.named_parameters():
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            return name
    return None


def node_bytes(node: torch.fx.Node) -> int:
    """The size of the tensors that a node of `trace_operations` results in.

    `make_fx` writes their shapes into `node.meta["tensor_meta"]`. The public `ShapeProp` would
    have to run the graph once more to do the same.
    """
    found = node.meta.get("tensor_meta")
    found = found if isinstance(found, tuple) and not hasattr(found, "shape") else [found]
    return sum(
        math.prod(each.shape) * each.dtype.itemsize for each in found if hasattr(each, "shape")
    )


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a traced graph for inputs of these shapes; it may change its inputs in place.

    The public way, `torch.compile(graph, fullgraph=True, options=...)`, puts Dynamo's guards in
    front of each call: on a CPU that took a step of a small MLP from 0.13 to 0.28 ms, and one of a
    small transformer from 0.45 to 0.86 ms.
    """
    from torch._inductor import standalone_compile

    return standalone_compile(
        graph,
        list(inputs),
        dynamic_shapes="from_example_inputs",
        options={"config_patches": dict(COMPILE_OPTIONS)},
    )


def compiled_code_folder() -> Path:
    """The folder in which Inductor keeps compiled code, TORCHINDUCTOR_CACHE_DIR if that is set."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())
