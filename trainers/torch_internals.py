"""Everything in this package that PyTorch keeps private or may change, as read in release 2.13.0.

Each item says why there is no public way. `tests/trainers/test_torch_internals.py` fails with the
name of the item when a release of PyTorch has another form of it.
"""

import inspect
import logging
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

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


def fake_tensor_mode() -> AbstractContextManager[Any]:
    """In here tensors have shapes and dtypes but no memory, and nothing is computed.

    `torch.device("meta")` is the public way, but mixing its tensors with those that a model makes
    on the CPU in `forward` is an error; fake tensors may be mixed. `torch.compile` uses the same,
    and its modules are imported for it, which takes 2 s of CPU time.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


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


def is_unfinished_reduction(error: BaseException) -> bool:
    """Whether DistributedDataParallel missed the gradient of a parameter in the step before.

    It raises a plain RuntimeError; its text is the only sign.
    """
    return isinstance(error, RuntimeError) and (
        "Expected to have finished reduction in the prior iteration" in str(error)
    )
