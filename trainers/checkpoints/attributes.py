"""State in plain attributes of modules, which is in no state_dict: what training changes of it.

A counter, a running mean or a table of averages that was there when the model was built, and that
has another value in the same form now, is state: it is saved as extra state is. What has another
form, such as a table that has grown, may be a cache, whose content follows from the inputs. It is
not saved, nor is a number that changes only when such a table of its module does.
"""

import random
import types
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainers.checkpoints.buffers import as_bytes, fill, saved_buffers
from trainers.checkpoints.shards import DTYPES
from trainers.worker import is_distributed, local_tensor

WORKLOAD = "the workload"
INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that each module has from PyTorch."""
LIBRARIES = ("torch.", "trainers.modeling.", "trainers.precision")
"""Modules of these packages alone keep no state in plain attributes."""
MAX_BYTES, MAX_ITEMS, MAX_DEPTH = 1 << 16, 10_000, 8
"""Larger arrays and containers are compared by their identity only."""
NUMBER = (("number",),)
EXACT = (type(None), bool, int, float, complex, str, bytes)
WRITABLE = {*DTYPES.values(), torch.complex128}
_Hash = tuple[ReferenceType[Tensor], int, int]
OPAQUE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


class Attributes:
    """The plain attributes of a model and its workload, compared with those that they began with.

    To be made before a checkpoint is loaded.
    """

    def __init__(self, model: nn.Module, workload: object = None) -> None:
        self._model, self._workload = ref(model), workload
        self._hashes: Mapping[int, _Hash] = {}
        self._built = self._last = self._look(model)
        self._alone: set[str] = set()
        """Attributes that have changed while no table of their module has."""

    def is_of(self, model: nn.Module) -> bool:
        """Whether they are those of this model."""
        return self._model() is model

    def changed(self, model: nn.Module) -> dict[str, Any]:
        """The values to save, by the names of the attributes."""
        state = self._state(self._observe(model))
        return {n: value for n, value in attributes_of(model, self._workload) if n in state}

    def unsaved(self, model: nn.Module) -> list[str]:
        """Those that have changed since the last time and are not saved, by name."""
        before = self._last
        now = self._observe(model)
        state = self._state(now)
        moved = [name for name, seen in now.items() if seen.differs(before.get(name))]
        return [name for name in moved if name not in state]

    def accept(self, model: nn.Module) -> None:
        """Take what differs from the model as built for state: it was in a checkpoint."""
        self._last = self._look(model)
        self._alone |= {name for name, seen in self._last.items() if self._is_other(name, seen)}

    def _observe(self, model: nn.Module) -> dict[str, "Seen"]:
        """What is there now. Notes what has changed on its own since the last time."""
        now = self._look(model)
        moved = {name for name, seen in now.items() if seen.differs(self._last.get(name))}
        tables = {_holder(n) for n in moved if not now[n].is_state(self._built.get(n))}
        self._alone |= {name for name in moved if _holder(name) not in tables}
        self._last = now
        return now

    def _state(self, now: Mapping[str, "Seen"]) -> set[str]:
        """The names of those that are state."""
        other = {name for name, seen in now.items() if self._is_other(name, seen)}
        state = {name for name in other if now[name].is_state(self._built.get(name))}
        tables = {_holder(name) for name in other - state}
        return {name for name in state if name in self._alone or _holder(name) not in tables}

    def _is_other(self, name: str, seen: "Seen") -> bool:
        return seen.differs(self._built.get(name))

    def _look(self, model: nn.Module) -> dict[str, "Seen"]:
        own, found = _Own(model, self._hashes), {}
        for name, value in attributes_of(model, self._workload):
            seen = Seen()
            _read(value, seen, own, 0)
            if not seen.ignored:
                found[name] = seen
        self._hashes = own.hashes
        return found


def attributes_of(model: nn.Module, workload: object = None) -> Iterator[tuple[str, Any]]:
    """The plain attributes and non-persistent buffers of the user's modules, by name.

    Those of the workload are `the workload:NAME`, those of a module `MODULE:NAME`. Modules with a
    `get_extra_state` say themselves what their state is.
    """
    persistent = {id(buffer) for buffer in saved_buffers(model).values()}
    for path, module in model.named_modules():
        kinds = type(module).__mro__[: -len(nn.Module.__mro__)]
        if all(f"{kind.__module__}.".startswith(LIBRARIES) for kind in kinds):
            continue
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            continue
        for name, value in vars(module).items():
            # FSDP keeps its state in attributes that begin so; a user's own cannot.
            if name not in INTERNAL and not name.startswith("__"):
                yield f"{path}:{name}", value
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in persistent:
                yield f"{path}:{name}", buffer
    for name, value in vars(workload).items() if workload is not None else ():
        yield f"{WORKLOAD}:{name}", value


def set_attributes(model: nn.Module, values: Mapping[str, Any], workload: object = None) -> None:
    """Give attributes the values of `Attributes.changed`. What has no place in them is left out.

    Tensors, lists and dicts are changed in place: other modules may share them.
    """
    modules = dict(model.named_modules())
    for name, value in values.items():
        path, _, last = name.rpartition(":")
        holder = workload if path == WORKLOAD else modules.get(path)
        if holder is not None:
            setattr(holder, last, _replaced(getattr(holder, last, None), value))


def described(name: str) -> str:
    """An attribute's name as users write it."""
    return name.replace(":", ".").lstrip(".")


@dataclass(eq=False)
class Seen:
    """The form and the content of a value at one time."""

    form: list[Hashable] = field(default_factory=list)
    content: list[Any] = field(default_factory=list)
    plain: bool = True
    """Whether a checkpoint can hold it."""
    ignored: bool = False
    """Whether it is the state of something else, or computed from weights."""

    def differs(self, before: "Seen | None") -> bool:
        if before is None:
            return True
        return self.form != before.form or self.content != before.content

    def is_state(self, built: "Seen | None") -> bool:
        """Whether another value in the form that it was built with; None for a new number."""
        return self.plain and self.form == (built.form if built else [*NUMBER])


class _Own:
    """What of a model is in its state_dict, or is a module of it."""

    def __init__(self, model: nn.Module, known: "Mapping[int, _Hash]") -> None:
        """`known` are the `hashes` of the last time."""
        self.modules = {id(module) for module in model.modules()}
        tensors = [*model.parameters(), *saved_buffers(model).values()]
        self.memory = {_memory(local_tensor(tensor)) for tensor in tensors} - {0}
        self.read: set[int] = set()
        self._known, self.hashes = known, dict[int, _Hash]()

    def hash_of(self, tensor: Tensor) -> int:
        """A hash of the content. A large tensor is read again only if it was written to."""
        version = -1 if tensor.is_inference() else tensor._version
        known = self._known.get(id(tensor))
        if tensor.nbytes > MAX_BYTES and known and known[0]() is tensor and known[1] == version:
            found = known[2]
        else:
            found = hash(as_bytes(tensor).cpu().numpy().tobytes())
        self.hashes[id(tensor)] = ref(tensor), version, found
        return found


def _holder(name: str) -> str:
    return name.rpartition(":")[0]


def _is_numeric(value: np.generic | npt.NDArray[Any]) -> bool:
    return value.dtype.kind in "biufc"


def _memory(tensor: Tensor) -> int:
    """Where the values of a tensor are; 0 if it has no memory of the usual kind."""
    has_none = tensor.layout != torch.strided or is_lazy(tensor)
    return 0 if has_none else tensor.untyped_storage().data_ptr()


def _read(value: Any, seen: Seen, own: _Own, depth: int) -> None:
    """Add a value's form and content to `seen`."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        exact = type(value) in EXACT or (isinstance(value, np.generic) and _is_numeric(value))
        seen.plain &= exact
        seen.form += NUMBER
        seen.content.append(f"{type(value).__name__} {value!r}")
    elif isinstance(value, Tensor):
        _read_tensor(value, seen, own)
    elif isinstance(value, np.ndarray):
        seen.plain &= _is_numeric(value)
        seen.form.append(("array", value.shape, value.dtype.str))
        small = value.nbytes <= MAX_BYTES and value.dtype.kind != "O"
        seen.content.append(hash(value.tobytes()) if small else id(value))
    elif isinstance(value, torch.Generator):
        seen.plain = False
        seen.content.append(value.get_state().numpy().tobytes())
    elif isinstance(value, random.Random):
        seen.plain = False
        seen.content.append(value.getstate())
    elif isinstance(value, np.random.Generator):
        seen.plain = False
        seen.content.append(repr(value.bit_generator.state))
    elif not isinstance(value, OPAQUE):
        _read_inner(value, seen, own, depth)


def _read_tensor(tensor: Tensor, seen: Seen, own: _Own) -> None:
    if isinstance(tensor, nn.Parameter) or tensor.requires_grad or is_distributed(tensor):
        seen.ignored = True
    elif tensor.layout != torch.strided or tensor.is_meta:
        seen.plain = False
        seen.form.append(str(tensor.layout))
    elif (memory := _memory(tensor)) and memory in own.memory:
        seen.ignored = True
    else:
        seen.plain &= tensor.dtype in WRITABLE
        # A small average takes the precision of what is added to it; large tables are converted.
        dtype = tensor.dtype if tensor.nbytes > MAX_BYTES else tensor.dtype.is_floating_point
        kind = ("tensor", tensor.shape, dtype)
        seen.form += NUMBER if tensor.ndim == 0 else [kind]
        seen.content.append(own.hash_of(tensor))


def _read_inner(value: Any, seen: Seen, own: _Own, depth: int) -> None:
    """Add what is in a container or an object."""
    kind: Any = type(value)
    seen.form.append(kind)
    if isinstance(value, nn.Module) and id(value) in own.modules:
        return
    containers = (list, tuple, deque, set, frozenset, dict)
    if not isinstance(value, containers) and not hasattr(value, "__dict__"):
        return
    if id(value) in own.read or depth == MAX_DEPTH:
        return
    inner: Any = value
    if isinstance(value, nn.Module):
        inner = value.state_dict()
    elif not isinstance(value, containers):
        inner = vars(value)
    seen.plain &= kind in (*containers, OrderedDict)
    seen.form.append(len(inner))
    if len(inner) > MAX_ITEMS:
        seen.content.append(id(value))
        return
    own.read.add(id(value))
    if isinstance(inner, dict):
        seen.plain &= all(isinstance(key, str | int | float | tuple) for key in inner)
        seen.form.append(tuple(map(repr, inner)))
        inner = inner.values()
    elif isinstance(inner, set | frozenset):
        inner = sorted(inner, key=repr)
    for each in [*inner]:
        _read(each, seen, own, depth + 1)
    own.read.discard(id(value))


@torch.no_grad()
def _replaced(current: Any, value: Any) -> Any:
    """`value`, in the place of `current` where it can be written there."""
    if isinstance(current, Tensor) and isinstance(value, Tensor):
        same = (current.shape, current.dtype) == (value.shape, value.dtype)
        if same and not (current.is_inference() or current.requires_grad):
            fill(current, value)
            return current
    elif isinstance(current, np.ndarray) and isinstance(value, np.ndarray):
        if current.shape == value.shape and current.flags.writeable:
            current[...] = value
            return current
    elif isinstance(current, dict) and isinstance(value, dict) and [*current] == [*value]:
        for key in value:
            current[key] = _replaced(current[key], value[key])
        return current
    elif isinstance(current, list) and isinstance(value, list) and len(current) == len(value):
        current[:] = map(_replaced, current, value)
        return current
    return value
