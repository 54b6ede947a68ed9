"""Values of a module's extra state to JSON and tensors, and back; nothing is pickled.

`nn.Module.get_extra_state` may return anything. What most modules return can be written plainly:
numbers, text, bytes, lists, tuples, sets, dicts, tensors and numpy arrays in any nesting.
"""

import base64
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.base.errors import CheckpointError

SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if type(d) is torch.dtype}
MAPPINGS: dict[str, Callable[[list[Any]], Any]] = {"dict": dict, "OrderedDict": OrderedDict}


def to_plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors are added to `tensors` as `name/0`, `name/1`, ...

    Raises CheckpointError, which says where, for a value of another kind.
    """
    return _to_plain(value, name, "", tensors)


def _to_plain(value: Any, name: str, path: str, tensors: dict[str, Tensor]) -> Any:
    kind = type(value).__name__
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_to_plain(v, name, f"{path}[{i}]", tensors) for i, v in enumerate(value)]
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) is complex:
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.dtype | torch.device):
        return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"scalar": _to_plain(np.asarray(value), name, path, tensors)}
    if type(value) is np.ndarray and value.dtype.kind in "biufc":
        copy = np.array(value, value.dtype.newbyteorder("="), order="C")
        return {"array": _to_plain(torch.from_numpy(copy), name, path, tensors)}
    if isinstance(value, Tensor) and value.layout == torch.strided:
        key = f"{name}/{sum(other.startswith(f'{name}/') for other in tensors)}"
        tensors[key] = value
        return {"tensor": key, "on": "cpu" if value.device.type == "cpu" else "device"}
    if type(value) is torch.Size:
        return {"size": list(value)}
    if kind in SEQUENCES and type(value) in (tuple, set, frozenset, deque):
        items = [_to_plain(v, name, f"{path}[{i}]", tensors) for i, v in enumerate(value)]
        return {kind: items, "maxlen": value.maxlen} if kind == "deque" else {kind: items}
    if type(value) in (dict, OrderedDict):
        keys = [_to_plain(key, name, f"{path}[{key!r}]", tensors) for key in value]
        values = [_to_plain(v, name, f"{path}[{key!r}]", tensors) for key, v in value.items()]
        return {kind: [list(pair) for pair in zip(keys, values, strict=True)]}
    where = f", at {path}" if path else ""
    module = name.partition("/")[2].removesuffix("_extra_state").rstrip(".")
    raise CheckpointError(
        f"{module or 'the model'}: get_extra_state returns a {kind}{where}; a checkpoint holds "
        "numbers, text, bytes, lists, tuples, sets, dicts, tensors and arrays"
    )


def from_plain(plain: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value of `to_plain`; tensors that were on a device are put on `device`."""
    if isinstance(plain, list):
        return [from_plain(each, tensors, device) for each in plain]
    if not isinstance(plain, dict):
        return plain
    kind, content = next(iter(plain.items()))
    if kind == "tensor":
        return tensors[content].to(device) if plain["on"] == "device" else tensors[content]
    if kind in ("array", "scalar"):
        array = from_plain(content, tensors, device)
        return array.numpy() if kind == "array" else array[()]
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dtype":
        return DTYPES[content]
    if kind == "device":
        return torch.device(content)
    if kind == "size":
        return torch.Size(content)
    values = from_plain(content, tensors, device)
    if kind == "deque":
        return deque(values, plain["maxlen"])
    if kind in MAPPINGS:
        return MAPPINGS[kind]([(key, value) for key, value in values])
    return SEQUENCES[kind](values)
