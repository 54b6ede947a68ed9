"""What was measured of trials and programs on this machine, kept beside the compiled programs.

A later sweep of the same network finds it, whatever its data set, seeds and search space, and need
not measure again. A measurement's key is a hash of all that it may depend on: the operations or the
source, shapes, constants, PyTorch, and the device. Files are written whole, so that any number of
processes may read and write, and be killed.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from cluster.base.files import write_atomic
from trainers.data.dataset import source_files
from trainers.devices import Device
from tuning.programs.program_signature import Variant, signature
from tuning.programs.torch_internals import COMPILE_OPTIONS, compiled_code_folder


def graph_key(graph: GraphModule, device: torch.device) -> str:
    """The key of a traced step on such a device: of its operations, shapes and constants."""
    digest = hashlib.sha256(graph.code.encode())
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            digest.update(repr(node.meta.get("tensor_meta")).encode())
        elif node.op == "get_attr":
            value = getattr(graph, node.target)
            digest.update(repr((value.shape, value.dtype)).encode())
            digest.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(_machine(device).encode())
    return digest.hexdigest()


def trial_key(
    variant: Variant, network: nn.Module, varied: Mapping[str, Any], device: Device
) -> str:
    """The key of a trial by itself: of its spec, its network and its workload's source.

    `varied` are the fields of the section `model` that do not count.
    """
    digest = hashlib.sha256(signature(variant, network, varied).encode())
    for path in source_files(type(variant.workload)):
        digest.update(path.read_bytes())
    digest.update(_machine(device.device).encode())
    return digest.hexdigest()


def read_measurement(key: str) -> dict[str, float]:
    """What `keep_measurement` wrote; {} if there is nothing."""
    path = _path(key)
    measured: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return measured


def keep_measurement(key: str, measured: Mapping[str, float]) -> None:
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(dict(measured)))


def _path(key: str) -> Path:
    return compiled_code_folder() / "heliostat" / f"{key}.json"


def _machine(device: torch.device) -> str:
    """The device, and what else decides how fast a step is on it."""
    kind = (
        f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}"
        if device.type == "cpu"
        else torch.get_device_module(device.type).get_device_name(device)
    )
    known = (torch.__version__, platform.node(), kind, torch.get_num_threads(), COMPILE_OPTIONS)
    return repr(known)
