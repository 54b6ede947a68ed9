"""Model and optimizer to named tensors and back."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.errors import CheckpointError
from trainers.checkpoints import shards
from trainers.checkpoints.manifest import read_manifest
from trainers.precision import as_real
from trainers.worker import is_distributed

MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, include_replicated: bool
) -> dict[str, Tensor]:
    """Everything that steps change, by name: `model.NAME`, and `optimizer.NAME/PART` per weight.

    Complex tensors are pairs of real numbers in it.

    Ranks other than 0 pass False for `include_replicated` and return sharded tensors only.
    Replicated state, such as running means, is saved by rank 0.
    """
    state = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    for weight, name in _trainable_names(model).items():
        for part, value in optimizer.state[weight].items():
            state[f"{OPTIMIZER_PREFIX}{name}/{part}"] = torch.as_tensor(value)
    return {k: as_real(v) for k, v in state.items() if include_replicated or is_distributed(v)}


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> tuple[int, dict[str, float]]:
    """Load a checkpoint into `model` and `optimizer`; returns its step and its scalars.

    Collective over `group`. Raises CheckpointError if the checkpoint is damaged or does not fit.
    Tensors are converted to the dtypes of the model.
    """
    manifest = read_manifest(path)
    kind = type(optimizer).__name__
    if manifest["optimizer"] != kind:
        raise CheckpointError(
            f"{path}: does not fit the optimizer: it was saved by {manifest['optimizer']}, "
            f"not {kind}"
        )
    shapes = shards.shapes(path)
    state = _matching_tensors(path, shapes, model)
    weights = {name: weight for weight, name in _trainable_names(model).items()}
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for key in shapes:
        if not key.startswith(OPTIMIZER_PREFIX):
            continue
        name, _, part = key.removeprefix(OPTIMIZER_PREFIX).rpartition("/")
        if name not in moments:
            raise CheckpointError(f"{path}: does not fit the optimizer: {name} is unknown")
        weight = weights[name]
        # Fused kernels pair a weight with its moments by their order in memory.
        moments[name][part] = (
            torch.zeros((), device=weight.device)
            if part == "step"
            else torch.empty_like(weight, requires_grad=False)
        )
        state[key] = as_real(moments[name][part])
    shards.read(state, path, group)
    for name, weight in weights.items():
        if moments[name]:
            optimizer.state[weight] = moments[name]
    return int(manifest["step"]), manifest["numbers"]


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Load the weights of a checkpoint into `model`; raises as `load_checkpoint` does."""
    read_manifest(path)
    shards.read(_matching_tensors(path, shards.shapes(path), model), path, None)


def _matching_tensors(
    path: Path, shapes: dict[str, list[int]], model: nn.Module
) -> dict[str, Tensor]:
    """The model's tensors under their names in a checkpoint with tensors of these shapes.

    Raises CheckpointError unless the checkpoint has the same names and shapes.
    """
    wanted = {name: as_real(tensor) for name, tensor in model.state_dict().items()}
    for key in shapes:
        if key.startswith(MODEL_PREFIX) and key.removeprefix(MODEL_PREFIX) not in wanted:
            name = key.removeprefix(MODEL_PREFIX)
            raise CheckpointError(f"{path}: does not fit the model: {name} is unknown")
    for name, tensor in wanted.items():
        found = shapes.get(MODEL_PREFIX + name, "missing")
        if found != list(tensor.shape):
            raise CheckpointError(
                f"{path}: does not fit the model: {name} is {found}, not {list(tensor.shape)}"
            )
    return {MODEL_PREFIX + name: tensor for name, tensor in wanted.items()}


def _trainable_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The names of the parameters that are trained."""
    return {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
