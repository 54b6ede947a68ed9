"""Everything in this package that PyTorch keeps private or may change, as read in release 2.13.0.

Each item says why there is no public way. `tests/trainers/test_torch_internals.py` fails with the
name of the item when a release of PyTorch has another form of it.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)
FlopFormula = Callable[..., int]
"""Operations of one call, from its arguments and its result, which is called `out_val`."""

SHARDING_INFO_KEY = "DCP_SHARDING_INFO"
"""Key of a safetensors file's metadata under which `HuggingFaceStorageReader` looks for the offsets
of the shards. The format is public in PyTorch's own writer only."""
SAVED_OFFSETS_KEY = "saved_offsets"
"""Key of the offsets of one shard, within that."""

_DCP_LOGGER = "c10d-NullHandler-dcp_logger"


def quiet_checkpoint_log() -> None:
    """Hide the two debug lines per tensor that distributed checkpointing logs.

    Its logger has no public name; `logging.getLogger("torch")` is not among its parents.
    """
    logging.getLogger(_DCP_LOGGER).setLevel(logging.WARNING)


def without_compile_guards(kind: type[OptimizerT]) -> type[OptimizerT]:
    """The class of optimizers without what its methods do to be left out of a `torch.compile`.

    For that they import `torch._dynamo` when they are first called, compiled or not: 2 s of CPU
    time in each worker, of which SymPy and DTensor are a part. Steps here are compiled without the
    optimizer. The methods beneath are `__wrapped__`, as Python has it; that a call of nothing else
    imports Dynamo is PyTorch's own affair.
    """
    methods: dict[str, Any] = {
        name: inspect.unwrap(getattr(Optimizer, name)) for name in ("add_param_group", "zero_grad")
    }
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods)


def mark_not_finite(tensors: list[Tensor], found: Tensor, one: Tensor) -> None:
    """Set `found`, a scalar of float32, to 1 if a number in one of the tensors is not finite.

    The tensors are of one dtype, and on the device of `found` and of `one`, which is 1. It is the
    kernel of the public `torch.amp.GradScaler`, which has no method for it alone. Norms find the
    same in several kernels, and on a CPU take five times as long.
    """
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)


def noting_operations(
    note: Callable[[Any, Sequence[Any], Any], None],
) -> AbstractContextManager[Any]:
    """In here `note(operation, inputs, result)` is called after each operation, backward ones too.

    `FlopCounterMode` does the same, but the class beneath imports `torch._dynamo` at its first
    operation, for 2 s of CPU time, to be left out of a `torch.compile`; and it sets hooks on all
    modules.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        supports_higher_order_operators = True

    def dispatch(
        self: Any, operation: Any, types: Any, inputs: Any = (), options: Any = None
    ) -> Any:
        result = operation(*inputs, **(options or {}))
        note(getattr(operation, "overloadpacket", operation), inputs, result)
        return result

    # Only a method that a class has from the start is hidden from Dynamo.
    Noting.__torch_dispatch__ = dispatch  # type: ignore[method-assign]
    return Noting()  # type: ignore[no-untyped-call]


def takes_functions(operation: Any) -> bool:
    """Whether an operation runs functions that it is given, as `torch.cond` does."""
    from torch._ops import HigherOrderOperator

    return isinstance(operation, HigherOrderOperator)


def flop_formulas() -> dict[Any, FlopFormula]:
    """PyTorch's formulas by operation, whose table is not public."""
    from torch.utils.flop_counter import flop_registry

    return dict(flop_registry)


@contextmanager
def noting_used_shards() -> Iterator[tuple[set[nn.Parameter], set[nn.Parameter]]]:
    """In here, the sharded parameters are noted for which a backward pass has a gradient, or none.

    A block that is called several times may have both. FSDP contributes zeros for missing ones, if
    `set_reduce_scatter_unused_params` says so, and does not tell for which parameters it did.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    used: set[nn.Parameter] = set()
    unused: set[nn.Parameter] = set()
    noted = {
        "unsharded_grad_data": used,
        "unsharded_accumulated_grad_data": used,
        "unsharded_zero_grad_data": unused,
    }
    before = {name: getattr(FSDPParam, name) for name in noted}

    def noting(name: str, parameter: Any) -> Any:
        noted[name].add(parameter.sharded_param)
        return before[name].fget(parameter)

    for name in noted:
        setattr(FSDPParam, name, property(partial(noting, name)))
    try:
        yield used, unused
    finally:
        for name, original in before.items():
            setattr(FSDPParam, name, original)


def compile_time_s() -> float:
    """Seconds that this process has spent in `torch.compile`; `torch.compiler` does not tell."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def allow_dropout_in_compiled_checkpoints() -> None:
    """Let `torch.compile` trace `torch.utils.checkpoint` over code with side effects.

    Our dropout modules store the next keys as they draw. A compiled block is computed again from
    its graph, in which the keys are fixed, so the side effect need not be repeated. PyTorch's own
    error message names this setting; `torch.compiler.config` does not have it.
    """
    import torch._dynamo

    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def is_shard_taken_for_whole(error: BaseException) -> bool:
    """Whether an operation got a sharded parameter that nobody has gathered, and a plain tensor.

    DTensor raises a plain RuntimeError; its text is the only sign.
    """
    return "got mixed torch.Tensor and DTensor" in str(error)
