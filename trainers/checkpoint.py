"""Saves of a run's state: whole or not there, checked when read, and never unpickled.

A checkpoint is a folder `step-00000120` with `state.safetensors`, which holds the tensors of
model and optimizer by name, and `manifest.json`, with the size and SHA-256 of the tensor file.
It gets its name when both have reached the disk. The numbers of the training rule (learning
rate, weight decay) are not in it: they are a function of the spec and the step.
"""

import concurrent.futures
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cluster.errors import CheckpointError
from cluster.files import commit_folder

STATE, MANIFEST = "state.safetensors", "manifest.json"
MODEL, OPTIMIZER = "model.", "optimizer."


class Checkpoints:
    """The checkpoints of one run, in one folder; written by its first worker."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._writing: concurrent.futures.Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        numbers: Mapping[str, float] | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Save the state after `step` steps; returns when it has been copied, not yet written.

        `numbers` are what else the next step depends on. `before_commit` is called in the
        writing thread before the checkpoint gets its name. Waits for the save before this one,
        and raises what went wrong with it.
        """
        self.wait()
        state = _state_of(model, optimizer)
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in state.items()
        }
        writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        kind = type(optimizer).__name__
        manifest = {"step": step, "optimizer": kind, "numbers": dict(numbers or {})}
        self._writing = writer.submit(self._write, manifest, copies, before_commit)
        writer.shutdown(wait=False)

    def wait(self) -> None:
        """Block until the save under way is on disk; raise what went wrong with it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def settled(self) -> Path | None:
        """The newest checkpoint, after the save under way."""
        self.wait()
        return self._all()[-1] if self._all() else None

    def _write(
        self,
        manifest: dict[str, Any],
        tensors: dict[str, Tensor],
        before_commit: Callable[[], None],
    ) -> None:
        final = self._folder / f"step-{manifest['step']:08d}"
        building = self._folder / f".{final.name}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        save_file(tensors, building / STATE)
        manifest = {**manifest, "files": {STATE: _digest(building / STATE)}}
        manifest["sha256"] = _digest_of(manifest)
        (building / MANIFEST).write_text(json.dumps(manifest))
        before_commit()
        if _is_whole(final):  # written before a restart, which gave the same again
            shutil.rmtree(building)
            return
        shutil.rmtree(final, ignore_errors=True)
        commit_folder(building, final)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over."""
        return next((path for path in reversed(self._all()) if _is_whole(path)), None)

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint can be used; says why not, unless there is none."""
    try:
        manifest_of(path)
    except CheckpointError as error:
        if path.exists():
            print(f"{error}; passed over", flush=True)
        return False
    return True


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, float]]:
    """Put a checkpoint's state into `model` and `optimizer`; returns its steps and `numbers`.

    Raises CheckpointError if it is damaged or does not fit. Numbers take the dtype of the model.
    """
    manifest = manifest_of(path)
    kind = type(optimizer).__name__
    if manifest["optimizer"] != kind:
        raise CheckpointError(
            f"{path}: does not fit the optimizer: it is of {manifest['optimizer']}, not {kind}"
        )
    tensors = _read(path)
    _load_network(path, tensors, model)
    names = _names(model)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names.values()}
    for key, tensor in tensors.items():
        if key.startswith(OPTIMIZER):
            name, _, part = key.removeprefix(OPTIMIZER).rpartition("/")
            if name not in found:
                raise CheckpointError(f"{path}: does not fit the optimizer: {name} is unknown")
            found[name][part] = tensor
    for weight, name in names.items():
        # Fused kernels pair a weight with its moments by their order in memory.
        optimizer.state[weight] = {
            part: value.to(weight.device)
            if part == "step"
            else torch.empty_like(weight).copy_(value)
            for part, value in found[name].items()
        }
    return int(manifest["step"]), manifest["numbers"]


def load_network(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights alone into `model`; raises as `load` does."""
    manifest_of(path)
    _load_network(path, _read(path), model)


def _load_network(path: Path, tensors: dict[str, Tensor], model: nn.Module) -> None:
    state, wanted_state = {}, model.state_dict()
    for key in tensors:
        if key.startswith(MODEL) and key.removeprefix(MODEL) not in wanted_state:
            name = key.removeprefix(MODEL)
            raise CheckpointError(f"{path}: does not fit the model: {name} is unknown")
    for name, wanted in wanted_state.items():
        tensor = tensors.get(MODEL + name)
        found = "missing" if tensor is None else list(tensor.shape)
        if tensor is None or found != list(wanted.shape):
            raise CheckpointError(
                f"{path}: does not fit the model: {name} is {found}, not {list(wanted.shape)}"
            )
        state[name] = tensor
    model.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path / STATE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that steps change, by name: `model.NAME`, and `optimizer.NAME/PART` of each weight."""
    state = {MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for weight, name in _names(model).items():
        for part, value in optimizer.state[weight].items():
            state[f"{OPTIMIZER}{name}/{part}"] = torch.as_tensor(value)
    return state


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The weights that are trained, with their names."""
    return {weight: name for name, weight in model.named_parameters() if weight.requires_grad}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _digest_of(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says; CheckpointError otherwise."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict) or manifest.get("sha256") != _digest_of(manifest):
            raise CheckpointError(f"{path}: {MANIFEST} is damaged")
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path}: {name} is truncated")
            if _digest(path / name) != expected:
                raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs)")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint: {error}") from error
    return manifest
