"""The floats that differ between the trials of one program: a column each, a row per slot.

Batched are the fields of the spec's section `model` that the sweep varies as floats, and every
float attribute of a module that changes with them when the network is built. All else has to be
equal: otherwise the trials need different programs.

Suffixes: K slots, F batched values.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainers.modeling.build import build_network
from trainers.modeling.dropout import DropoutRate, DropoutRng
from trainers.workload import Workload
from tuning.programs.program_signature import (
    Variant,
    module_floats,
    patched_attributes,
    with_model_values,
)
from tuning.programs.vmap_rewrites import MODEL_SECTION, Guards, ValuePath, VmapRewrites


class BatchedValues:
    """Which floats of a program are batched, and the values of each slot."""

    def __init__(
        self,
        variant: Variant,
        network: nn.Module,
        dropout_rng: DropoutRng,
        varied: Mapping[str, Sequence[float]],
        slot_zeros_K: Tensor,
    ) -> None:
        """`network` is the one of `variant`, whose values all slots hold at first.

        `slot_zeros_K` gives the number of slots, the device and the dtype.
        """
        self._workload, self._network = variant.workload, network
        self._dropout_modules = dropout_rng.modules
        self._floats = module_floats(network)
        self.paths = [*_find_batched(variant, self._floats, varied)]
        self._traced_values = self.of(variant, network)
        self._guards: Guards = {}
        self.values_KF = slot_zeros_K[:, None].repeat(1, len(self.paths))
        self.thresholds_KF = self.values_KF.to(torch.int64)
        self._write(slice(None), self._traced_values)

    def of(self, variant: Variant, network: nn.Module) -> dict[ValuePath, float]:
        """The batched values of a trial, in the order of their columns."""
        model, floats = variant.workload.model, module_floats(network)
        return {
            (module, name): (
                float(getattr(model, name)) if module == MODEL_SECTION else floats[module, name]
            )
            for module, name in self.paths
        }

    def in_modules(self, network: nn.Module) -> dict[ValuePath, float]:
        """The batched values that are attributes of a trial's modules."""
        floats = module_floats(network)
        return {path: floats[path] for path in self.paths if path[0] != MODEL_SECTION}

    def accept(self, variant: Variant, network: nn.Module) -> bool:
        """Whether a trial's floats differ in batched ones only, and satisfy all guards."""
        floats = module_floats(network)
        if floats.keys() != self._floats.keys():
            return False
        if any(floats[p] != self._floats[p] for p in self._floats.keys() - set(self.paths)):
            return False
        values = self.of(variant, network)
        return all(
            getattr(operator, test)(values[path], other) == outcome
            for (path, test, other), outcome in self._guards.items()
        )

    def set_slot(self, slot: int, variant: Variant, network: nn.Module) -> None:
        """Write a trial's values into a slot."""
        self._write(slot, self.of(variant, network))

    @contextmanager
    def substituted(self, values_F: Tensor, thresholds_F: Tensor) -> Iterator[Workload]:
        """Replace the batched floats by one slot's tensors: in the modules, and in the workload.

        Yields that workload; runs under vmap, while the step is traced.
        """
        values = dict(zip(self.paths, values_F.unbind(), strict=True))
        thresholds = dict(zip(self.paths, thresholds_F.unbind(), strict=True))
        fields = {
            name: value for (module, name), value in values.items() if module == MODEL_SECTION
        }
        attributes = {
            path: DropoutRate(thresholds[path], value) if self._is_dropout_rate(path) else value
            for path, value in values.items()
            if path[0] != MODEL_SECTION
        }
        traced = [(value, (path, self._traced_values[path])) for path, value in values.items()]
        rewrites = VmapRewrites(traced, self._guards)
        with patched_attributes(self._network, attributes), rewrites:
            yield with_model_values(self._workload, fields)

    def _write(self, slots: int | slice, values: Mapping[ValuePath, float]) -> None:
        for column, (path, value) in enumerate(values.items()):
            if self._is_dropout_rate(path):  # in the form in which it is used, computed exactly
                rate = DropoutRate.from_probability(value)
                self.thresholds_KF[slots, column] = rate.threshold
                value = float(rate.scale)
            self.values_KF[slots, column] = value

    def _is_dropout_rate(self, path: ValuePath) -> bool:
        module, _ = path
        return module != MODEL_SECTION and (
            self._network.get_submodule(module) in self._dropout_modules
        )


def _find_batched(
    variant: Variant, floats: Mapping[ValuePath, float], varied: Mapping[str, Sequence[float]]
) -> Iterator[ValuePath]:
    """The varied fields, then the module attributes that change with them."""
    yield from ((MODEL_SECTION, name) for name in varied)
    found = set()
    with torch.random.fork_rng(devices=[]):
        for name, values in varied.items():
            for value in values:
                changed = with_model_values(variant.workload, {name: value})
                built = build_network(variant.spec.train, changed)
                other = module_floats(built)
                found |= {path for path in floats if other.get(path, floats[path]) != floats[path]}
    yield from sorted(found)
