"""Whether two trials can share a program: what may differ between them, and what may not."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainers.modeling.build import build_network
from trainers.spec import RunSpec
from trainers.workload import Workload
from tuning.programs.torch_internals import with_backward_hooks
from tuning.programs.trial_state import named_tensors
from tuning.programs.vmap_rewrites import NotFusibleError, ValuePath


@dataclass(frozen=True)
class Variant:
    """The resolved configuration of one trial."""

    spec: RunSpec
    workload: Workload
    total_steps: int


def unsupported_reason(spec: RunSpec) -> str | None:
    """The setting of a trial that prevents fusing, with the reason; None if there is none."""
    train, scale = spec.train, spec.scale
    if scale.max_workers > 1:
        return "scale.workers: a trial of several workers is spread over devices"
    if train.precision in ("fp16", "fp8"):
        return f"train.precision: {train.precision} scales by values found in the loss or weights"
    if train.micro_batch is not None:
        return "train.micro_batch: a slot processes the whole batch at once"
    if train.activation_checkpointing:
        return "train.activation_checkpointing: blocks are recomputed by hooks"
    if train.on_nonfinite == "skip":
        return "train.on_nonfinite: a skipped step would shift a trial's schedule"
    return None


def with_model_values(workload: Workload, values: Mapping[str, Any]) -> Workload:
    """A copy of the workload with some fields of its section `model` replaced, unvalidated."""
    changed = copy.copy(workload)
    changed.model = workload.model.model_copy(update=dict(values))
    return changed


@contextmanager
def patched_attributes(network: nn.Module, values: Mapping[ValuePath, Any]) -> Iterator[None]:
    """Set attributes of submodules for the duration of the context."""
    before = {path: getattr(network.get_submodule(path[0]), path[1]) for path in values}
    for (module, name), value in values.items():
        object.__setattr__(network.get_submodule(module), name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            object.__setattr__(network.get_submodule(module), name, value)


def module_floats(network: nn.Module) -> dict[ValuePath, float]:
    """The float attributes of all submodules, such as the rate of a dropout."""
    return {
        (module, name): value
        for module, part in network.named_modules()
        for name, value in vars(part).items()
        if type(value) is float
    }


def signature(variant: Variant, network: nn.Module, varied: Mapping[str, Any]) -> str:
    """Trials with equal signatures can share a program, provided that it accepts their floats.

    `varied` are the fields of the section `model` that are batched, by name. Raises NotFusibleError
    for a network with state that is not in tensors of a known shape, or with backward hooks.
    """
    if hooked := with_backward_hooks(network):
        raise NotFusibleError(f"{hooked} has hooks on its backward pass, which are not called")
    for name, part in network.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            raise NotFusibleError(f"{name or 'the model'} has extra state, which is not in tensors")
    spec = variant.spec
    workload = variant.workload
    sections = (workload.data.model_dump(), workload.model.model_dump(exclude=set(varied)))
    modules = [
        (name, type(part).__qualname__, part.training, _plain_attributes(vars(part)))
        for name, part in network.named_modules()
    ]
    held = [*network.named_parameters(), *network.named_buffers()]
    if lazy := [name for name, tensor in held if is_lazy(tensor)]:
        raise NotFusibleError(f"{lazy[0]} is of a lazy module, which has no shape yet")
    tensors = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in held]
    clips = spec.train.clip_norm is not None
    rule = (spec.optimizer.name, spec.train.global_batch, spec.train.precision, clips)
    return repr((spec.workload, rule, sections, modules, tensors))


def check_buffers(built: Mapping[str, Tensor], network: nn.Module) -> None:
    """Raise NotFusibleError if a forward pass has made buffers, or changed their shapes.

    `built` are the parameters and buffers of before the pass.
    """
    now = {name: tensor.shape for name, tensor in named_tensors(network).items()}
    before = {name: tensor.shape for name, tensor in built.items()}
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise NotFusibleError(f"a forward pass makes the buffer {changed[0]} or changes its shape")


def program_key(variant: Variant, varied: Mapping[str, Any]) -> str:
    """The signature of a trial, whose network is built for it."""
    return signature(variant, build_network(variant.spec.train, variant.workload), varied)


def _plain_attributes(attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    kinds = (bool, int, str, tuple, type(None))
    public = {k: v for k, v in attributes.items() if not k.startswith("_")}
    return sorted((k, repr(v)) for k, v in public.items() if isinstance(v, kinds))
