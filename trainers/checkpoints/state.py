"""Model and optimizer to named tensors and back.

The model's part is its `state_dict`, as in a plain PyTorch loop, with all that modules add to it:
buffers that appeared since the model was built, extra state of any plain kind, and what steps
have changed of plain attributes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cluster.base.errors import CheckpointError, TrainingError
from trainers.checkpoints import shards
from trainers.checkpoints.attributes import WRITABLE, Attributes, set_attributes
from trainers.checkpoints.buffers import has_no, is_expanded, saved_buffers, set_buffer
from trainers.checkpoints.manifest import read_manifest
from trainers.checkpoints.plain_values import from_plain, to_plain
from trainers.checkpoints.shards import SavedTensor
from trainers.worker import is_distributed

MODEL_PREFIX, OPTIMIZER_PREFIX, EXTRA_PREFIX = "model.", "optimizer.", "extra/"
ATTRIBUTE = "attribute/"
"""Before the names of plain attributes among the extra state."""
EXTRA_STATE = "_extra_state"
"""PyTorch's name, within a module, of what its `get_extra_state` returns."""


@dataclass(frozen=True)
class State:
    """Everything that steps change, in the form in which it is written."""

    tensors: dict[str, Tensor]
    """`model.NAME`, `optimizer.NAME/PART` per weight, `extra/NAME/NUMBER` within extra state."""
    buffers: list[str] = field(default_factory=list)
    """The names of the model's buffers, which need not be those that it was built with."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Extra state of modules, by its name in the state_dict; see `plain_values`."""


def collect_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    include_replicated: bool,
    attributes: Attributes | None = None,
) -> State:
    """The state of a model and its optimizer. Raises CheckpointError for what cannot be written.

    Complex tensors are pairs of real numbers in it.

    Ranks other than 0 pass False for `include_replicated` and return sharded tensors only.
    Replicated state, such as running means, is saved by rank 0.
    """
    tensors, extra = model_state(model, attributes)
    for weight, name in _trainable_names(model).items():
        for part, value in optimizer.state[weight].items():
            tensors[f"{OPTIMIZER_PREFIX}{name}/{part}"] = torch.as_tensor(value)
    buffers = list(saved_buffers(model))
    kept = {k: v for k, v in tensors.items() if include_replicated or is_distributed(v)}
    return State(kept, buffers, extra)


def model_state(
    model: nn.Module, attributes: Attributes | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a model, `model.NAME` and `extra/NAME/NUMBER`, and its extra state.

    With `attributes`, those that have changed are a part of the extra state.

    Raises CheckpointError for what cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if _is_extra(name, value):
            extra[name] = to_plain(value, EXTRA_PREFIX + name, tensors)
        elif is_distributed(value):
            tensors[MODEL_PREFIX + name] = value
        else:
            _check_writable(name, value)
            # A conjugate may be a flag on a memory that is not, which a copy of the memory loses.
            tensors[MODEL_PREFIX + name] = value.detach().resolve_conj().resolve_neg()
    for name, value in (attributes.changed(model) if attributes else {}).items():
        extra[ATTRIBUTE + name] = to_plain(value, EXTRA_PREFIX + ATTRIBUTE + name, tensors)
    return tensors, extra


def check_model_state(model: nn.Module) -> None:
    """Raise TrainingError, before any step, if the state of a model cannot be saved and loaded."""
    for name, module in model.named_modules():
        kind = type(module)
        if (
            kind.get_extra_state is not nn.Module.get_extra_state
            and kind.set_extra_state is nn.Module.set_extra_state
        ):
            raise TrainingError(f"{name or 'the model'}: {kind.__name__} must have set_extra_state")
    try:
        model_state(model)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
    note: Callable[[str], None] = lambda text: None,
    workload: object = None,
    changed_at: int | None = None,
) -> tuple[int, dict[str, float]]:
    """Load a checkpoint into `model` and `optimizer`; returns its step and its scalars.

    Collective over `group`. Raises CheckpointError if the checkpoint is damaged or does not fit.
    Tensors are converted to the dtypes of the model. Of another run's checkpoint, which
    `Checkpoints.import_from` made, only the weights must fit: of the optimizer's state, that of
    the weights that both runs train is taken. `note` is called with a line that says so. The same
    holds for a checkpoint after `changed_at` steps, where the run's own spec has changed.
    """
    manifest = read_manifest(path)
    if manifest["step"] == changed_at:
        manifest["from"] = f"step {changed_at}"
    donor, kind = manifest.get("from"), type(optimizer).__name__
    same_kind = manifest["optimizer"] == kind
    if not same_kind and not donor:
        raise CheckpointError(
            f"{path}: does not fit the optimizer: it was saved by {manifest['optimizer']}, "
            f"not {kind}"
        )
    weights = {name: weight for weight, name in _trainable_names(model).items()}
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    targets: dict[str, Tensor] = {}
    source = _saved_state(path, manifest)
    for key in source.tensors if same_kind else ():
        if not key.startswith(OPTIMIZER_PREFIX):
            continue
        name, _, part = key.removeprefix(OPTIMIZER_PREFIX).rpartition("/")
        if name in moments:
            weight = weights[name]
            # Fused kernels pair a weight with its moments by their order in memory.
            moments[name][part] = targets[key] = (
                torch.zeros((), device=weight.device)
                if part == "step"
                else torch.empty_like(weight, requires_grad=False)
            )
        elif not donor:
            raise CheckpointError(f"{path}: does not fit the optimizer: {name} is unknown")
    source.load(model, targets, group, workload)
    for name, weight in weights.items():
        if moments[name]:
            optimizer.state[weight] = moments[name]
    if donor:
        kinds = (manifest["optimizer"], kind)
        note(f"the weights of {donor}, {_optimizer_taken(kinds, moments)}")
    return int(manifest["step"]), manifest["numbers"]


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Load the model's part of a checkpoint; raises as `load_checkpoint` does."""
    _saved_state(path, read_manifest(path)).load(model)


def _saved_state(path: Path, manifest: Mapping[str, Any]) -> "SavedState":
    buffers, extra, foreign = manifest.get("buffers"), manifest.get("extra", {}), "from" in manifest
    return SavedState(path, buffers, extra, foreign=foreign)


class SavedState:
    """The model's part of a checkpoint or of an exported model."""

    def __init__(
        self,
        place: Path,
        buffers: Collection[str] | None,
        extra: Mapping[str, Any],
        prefix: str = MODEL_PREFIX,
        foreign: bool = False,
    ) -> None:
        """The state in a folder of files, or in a file, with `prefix` before the names.

        `buffers` and `extra` are those of `State`; an earlier release did not write the buffers.
        `foreign` says that it is of another run.
        """
        self._place, self._prefix, self._foreign = place, prefix, foreign
        self._buffers, self._extra = buffers, extra
        self.tensors = shards.saved_tensors(place)

    def _named(self) -> Iterator[tuple[str, SavedTensor]]:
        """The model's own tensors."""
        for key, found in self.tensors.items():
            if key.startswith(self._prefix) and not key.startswith(EXTRA_PREFIX):
                yield key.removeprefix(self._prefix), found

    def load(
        self,
        model: nn.Module,
        others: Mapping[str, Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
        workload: object = None,
    ) -> None:
        """Load it into `model`, and fill `others`, tensors by their names in the files.

        Attributes of the workload are given to `workload`, if that is there.
        Collective over `group`. Raises CheckpointError if it does not fit.
        """
        own = _model_tensors(model)
        changed = self._changed_buffers(model, own)
        device = next((tensor.device for tensor in own.values()), torch.device("cpu"))
        inner = {
            key: torch.empty(found.shape, dtype=found.dtype)
            for key, found in self.tensors.items()
            if key.startswith(EXTRA_PREFIX)
        }
        targets: dict[str, Tensor] = {}
        for name, found in self._named():
            if name in changed or is_lazy(own[name]):
                dtype = found.dtype if name in changed else own[name].dtype
                targets[name] = torch.empty(found.shape, dtype=dtype, device=device)
            else:
                targets[name] = own[name]
        named = {self._prefix + name: tensor for name, tensor in targets.items()}
        shards.read({**named, **inner, **(others or {})}, self._place, group)
        extra = {k: from_plain(plain, inner, device) for k, plain in self._extra.items()}
        for name, other in changed.items():
            set_buffer(model, name, targets[name] if other else None)
        attributes = {k: extra.pop(k) for k in [*extra] if k.startswith(ATTRIBUTE)}
        kept = {name: tensor for name, tensor in targets.items() if name not in changed}
        try:
            _adopt(model, {**kept, **extra})
        except RuntimeError as error:  # of a module's own way to load its state
            raise self._misfit(" ".join(str(error).split())) from error
        plain = {name.removeprefix(ATTRIBUTE): value for name, value in attributes.items()}
        set_attributes(model, plain, workload)

    def _changed_buffers(
        self, model: nn.Module, own: Mapping[str, Tensor]
    ) -> dict[str, SavedTensor | None]:
        """The model's buffers that were saved in another form; None for one that was not saved.

        Raises CheckpointError if anything else does not fit.
        """
        saved, known = dict(self._named()), self._buffers or ()
        changed: dict[str, SavedTensor | None] = {}
        for name, found in saved.items():
            if name not in own and not (name in known and has_no(model, name)):
                raise self._misfit(f"{name} is unknown")
            if name not in own:
                changed[name] = found
        # Another run may have been given another model, whose buffers differ by design.
        free = saved_buffers(model) if self._buffers is not None and not self._foreign else {}
        for name, tensor in own.items():
            other = saved.get(name)
            if other is not None and _fits(tensor, other):
                continue
            if name in free and (other is None or name in known):
                changed[name] = other
            else:
                raise self._misfit(_difference(name, tensor, other))
        return changed

    def _misfit(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._place}: does not fit the model: {reason}")


def _adopt(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Have a model load values of its state_dict, which may be the model's own tensors, filled.

    Modules may do more with a state than to copy it: lazy ones take their shapes from it.
    """
    state = model.state_dict()  # a dict that also says which versions of modules have made it
    for name in [*state]:
        del state[name]
    for name, value in values.items():
        # An expanded tensor cannot be copied to; it has its values already.
        if not isinstance(value, Tensor) or is_lazy(value) or not is_expanded(value):
            state[name] = value
    model.load_state_dict(state, strict=False)


def _difference(name: str, tensor: Tensor, saved: SavedTensor | None) -> str:
    """How a saved tensor differs from the one of the model."""
    if saved is None:
        return f"{name} is missing" + ("" if is_lazy(tensor) else f", not {list(tensor.shape)}")
    if saved.shape != list(tensor.shape):
        return f"{name} is {saved.shape}, not {list(tensor.shape)}"
    return f"{name} is {_kind(saved.dtype)}, not {_kind(tensor.dtype)}"


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state_dict by name, without extra state."""
    return {name: value for name, value in model.state_dict().items() if not _is_extra(name, value)}


def _is_extra(name: str, value: Any) -> bool:
    return not isinstance(value, Tensor) or name.rpartition(".")[2] == EXTRA_STATE


def _fits(tensor: Tensor, saved: SavedTensor) -> bool:
    """Whether saved values can be those of a tensor, if need be in another precision."""
    if is_lazy(tensor):
        return True
    return list(tensor.shape) == saved.shape and _kind(tensor.dtype) == _kind(saved.dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "real" if dtype.is_floating_point else str(dtype).removeprefix("torch.")


def _check_writable(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise CheckpointError(
            f"{name}: the lazy module has no shape yet; `build` must run it once, on zeros"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in WRITABLE:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
        raise CheckpointError(
            f"{name}: the model's state holds a tensor of {kind.removeprefix('torch.')}, which a "
            "checkpoint cannot; make it a dense one, or a buffer with persistent=False"
        )


def _optimizer_taken(kinds: tuple[str, str], moments: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What was taken of another optimizer's state, in a few words."""
    if kinds[0] != kinds[1]:
        return f"and nothing of its optimizer, which is {kinds[0]}, not {kinds[1]}"
    new = [name for name, parts in moments.items() if not parts]
    if not new:
        return "and its optimizer's state"
    if len(new) == len(moments):
        return "and nothing of its optimizer"
    more = f" and {len(new) - 3} more" if len(new) > 3 else ""
    listed = ", ".join(new[:3]) + more
    return f"and its optimizer's state but for {listed}, which begin anew"


def _trainable_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The names of the parameters that are trained."""
    return {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
