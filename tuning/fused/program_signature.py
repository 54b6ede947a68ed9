"""What sets the trials of a sweep apart: numbers of one program, or another program."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainers.modeling.build import build_network
from trainers.spec import RunSpec
from trainers.workload import Workload
from tuning.fused.vmap_rewrites import MODEL_SECTION, ValuePath


@dataclass(frozen=True)
class Variant:
    """A trial as it is to be trained."""

    spec: RunSpec
    workload: Workload
    total_steps: int


def unsupported_reason(spec: RunSpec) -> str | None:
    """What in a trial's spec keeps it from being fused; None when nothing does."""
    train, scale = spec.train, spec.scale
    if scale.max_workers > 1:
        return "scale.workers: a trial of several workers is spread over devices"
    if train.precision in ("fp16", "fp8"):
        return f"train.precision: {train.precision} scales by what it finds in the loss or weights"
    if train.micro_batch is not None:
        return "train.micro_batch: a slot takes the whole batch at once"
    if train.activation_checkpointing:
        return "train.activation_checkpointing: blocks are computed again by hooks"
    if train.on_nonfinite == "skip":
        return "train.on_nonfinite: skipped steps would set a slot's step apart from its age"
    return None


def with_model_values(workload: Workload, values: Mapping[str, Any]) -> Workload:
    """The workload with other values in its section `model`, which are not checked."""
    changed = copy.copy(workload)
    changed.model = workload.model.model_copy(update=dict(values))
    return changed


@contextmanager
def patched_attributes(network: nn.Module, values: Mapping[ValuePath, Any]) -> Iterator[None]:
    """Attributes of modules in here are these."""
    before = {place: getattr(network.get_submodule(place[0]), place[1]) for place in values}
    for (module, name), value in values.items():
        object.__setattr__(network.get_submodule(module), name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            object.__setattr__(network.get_submodule(module), name, value)


def module_floats(network: nn.Module) -> dict[ValuePath, float]:
    """The numbers that stand in modules, such as a dropout's rate."""
    return {
        (module, name): value
        for module, part in network.named_modules()
        for name, value in vars(part).items()
        if type(value) is float
    }


def batched_values(
    variant: Variant, floats: Mapping[ValuePath, float], varied: Mapping[str, Sequence[float]]
) -> Iterator[ValuePath]:
    """The fields that vary, and the numbers in modules that vary with them."""
    yield from ((MODEL_SECTION, name) for name in varied)
    found = set()
    with torch.random.fork_rng(devices=[]):
        for name, values in varied.items():
            for value in values:
                other = module_floats(with_model_values(variant.workload, {name: value}).build())
                found |= {p for p in floats if other.get(p, floats[p]) != floats[p]}
    yield from sorted(found)


def signature(variant: Variant, network: nn.Module, varied: Mapping[str, Any]) -> str:
    """What two trials have in common that are the same program but for numbers."""
    spec = variant.spec
    workload = variant.workload
    sections = (workload.data.model_dump(), workload.model.model_dump(exclude=set(varied)))
    modules = [
        (name, type(part).__qualname__, part.training, _plain(vars(part)))
        for name, part in network.named_modules()
    ]
    held = [*network.named_parameters(), *network.named_buffers()]
    tensors = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in held]
    clips = spec.train.clip_norm is not None
    rule = (spec.optimizer.name, spec.train.global_batch, spec.train.precision, clips)
    return repr((spec.workload, rule, sections, modules, tensors))


def program_key(variant: Variant, varied: Mapping[str, Any]) -> str:
    """The same for trials that are one program but for numbers, guards left aside."""
    return signature(variant, build_network(variant.spec.train, variant.workload), varied)


def _plain(attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    kinds = (bool, int, str, tuple, type(None))
    public = {k: v for k, v in attributes.items() if not k.startswith("_")}
    return sorted((k, repr(v)) for k, v in public.items() if isinstance(v, kinds))
