"""Saves of a run's state: whole or not there, checked when read, and never unpickled.

A checkpoint is a folder `step-00000120` with the tensors of model and optimizer by name, in one
safetensors file per worker that had some, and `manifest.json` with the size and SHA-256 of every
file. It gets its name when all have reached the disk. The numbers of the training rule (learning
rate, weight decay) are not in it: they are a function of the spec and the step.
"""

import concurrent.futures
import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from cluster.base.errors import CheckpointError, SpecError
from cluster.base.files import write_atomic
from trainers.checkpoints import shards
from trainers.run_folder import CHECKPOINTS
from trainers.spec import CheckpointSpec
from trainers.stores import MANIFEST, LocalStore, RemoteStore, Store
from trainers.worker import Worker

MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class Checkpoints:
    """The checkpoints of one run, which its workers write together."""

    def __init__(
        self, folder: Path, spec: CheckpointSpec | None = None, worker: Worker | None = None
    ) -> None:
        """Those in `folder`, or at `spec.uri` under the folder's name; collective.

        A folder whose checkpoints are elsewhere holds a file that says where; `spec` is needed
        for saving only.
        """
        self._spec = spec or CheckpointSpec()
        self._worker = worker or Worker()
        self._store = _open_store(folder, self._spec.uri, self._worker)
        self._group = dist.new_group(backend="gloo") if self._worker.world_size > 1 else None
        pinned = self._worker.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))
        self._writing: concurrent.futures.Future[None] | None = None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scalars: Mapping[str, float] | None = None,
        metrics: Mapping[str, float] | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Save the state after `step` steps; returns when it has been copied, not yet written.

        `numbers` are what else the next step depends on, `metrics` those of an evaluation of this
        state. `before_commit` is called in the first worker's writing thread before the
        checkpoint gets its name. Waits for the save before this one, and raises what went wrong
        with it. Collective.
        """
        self.wait()
        copies = self._stager.stage(
            _collect_state(model, optimizer, include_replicated=self._worker.is_rank_zero)
        )
        assert isinstance(copies, dict)  # the stager was not asked to do it in the background
        self._worker.hardware.synchronize()
        manifest = {
            "step": step,
            "optimizer": type(optimizer).__name__,
            "numbers": dict(scalars or {}),
            "metrics": dict(metrics or {}),
        }
        writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = writer.submit(self._write, manifest, copies, before_commit)
        writer.shutdown(wait=False)

    def wait(self) -> None:
        """Block until the save under way is on disk; raise what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def wait_for_latest(self) -> Path | None:
        """The newest checkpoint, after the save under way."""
        self.wait()
        names = self._store.names()
        return self._store.download(names[-1]) if names else None

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, dict[str, float]]:
        """Load the newest whole checkpoint, as `load` does; (0, {}) if there is none. Collective.

        However many workers wrote it, in whatever parallel mode.
        """
        name = self._run_on_first(lambda: (path := self.latest()) and path.name)
        if name is None:
            return 0, {}
        return load_checkpoint(self._store.download(name), model, optimizer, self._group)

    def import_from(self, path: Path) -> None:
        """Make a copy of another run's checkpoint one of this run's; not collective.

        What it says about the other run's own course stays behind.
        """
        manifest = read_manifest(path)
        name = f"step-{manifest['step']:08d}"
        numbers = {k: v for k, v in manifest["numbers"].items() if not k.startswith("goodput.")}
        self._store.start_write(name)
        for file in manifest["files"]:
            shutil.copy(path / file, self._store.staging_dir(name))
            self._store.upload(name, file)
        _write_manifest(self._store.staging_dir(name), {**manifest, "numbers": numbers})
        self._store.commit(name)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over."""
        return next(filter(None, map(self._validated, reversed(self._store.names()))), None)

    def _write(
        self,
        manifest: dict[str, Any],
        tensors: Mapping[str, Tensor],
        before_commit: Callable[[], None],
    ) -> None:
        name = f"step-{manifest['step']:08d}"
        file, store = shards.shard_file(self._worker.rank), self._store
        # What was written before a restart would be the same again.
        there = self._run_on_first(lambda: self._validated(name) is not None)
        if there:
            if self._worker.is_rank_zero:
                before_commit()
            return
        try:
            self._run_on_first(lambda: store.start_write(name))
            folder = store.staging_dir(name)
            shards.write(tensors, folder, self._group)
            own = {}
            if (folder / file).exists():
                own[file] = _file_digest(folder / file)
                store.upload(name, file)
            files = self._gather_files(own)  # once all have published

            def commit() -> None:
                _write_manifest(folder, {**manifest, "files": files})
                before_commit()
                store.commit(name)
                self._apply_retention()

            self._run_on_first(commit)
        except BaseException as error:
            if self._worker.is_rank_zero:
                store.abort(name)
            raise _write_error(error, store.describe(name)) from error

    def _run_on_first(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on the first worker, or its error, on all of them; collective."""
        answer: list[Any] = [None, None]
        if self._worker.is_rank_zero:
            try:
                answer = [action(), None]
            except OSError as error:
                answer = [None, error]
        if self._group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def _gather_files(self, own: dict[str, Any]) -> dict[str, Any]:
        """The entries of all workers together; collective."""
        if self._group is None:
            return own
        parts: list[dict[str, Any]] = [{} for _ in range(self._worker.world_size)]
        dist.all_gather_object(parts, own, group=self._group)
        return {key: value for part in parts for key, value in part.items()}

    def _apply_retention(self) -> None:
        """Keep the newest, and the best by the spec's metric."""
        names = self._store.names()
        kept = set(names[-self._spec.keep :])
        if self._spec.keep_best:
            scores = {name: self._score(name) for name in names}
            kept |= set(sorted(names, key=lambda name: scores[name])[: self._spec.keep_best])
        for name in names:
            if name not in kept:
                self._store.remove(name)

    def _score(self, name: str) -> float:
        """Smaller is better; infinite for what was not evaluated."""
        manifest = json.loads(self._store.read_manifest(name))
        value = manifest["metrics"].get(self._spec.metric, math.inf)
        return -value if self._spec.mode == "max" and value != math.inf else float(value)

    def _validated(self, name: str) -> Path | None:
        """A checkpoint that can be used; says why it cannot, unless there is none."""
        if name not in self._store.names():
            return None
        try:
            path = self._store.download(name)
            read_manifest(path)
        except (CheckpointError, OSError, ValueError) as error:
            reason = str(error) if isinstance(error, CheckpointError) else f"{name}: {error}"
            print(f"{reason}; passed over", flush=True)
            return None
        return path


def _open_store(folder: Path, uri: str | None, worker: Worker) -> Store:
    pointer = folder / "elsewhere.json"
    if uri is None and not pointer.exists():
        return LocalStore(folder)
    if uri is None:
        where = json.loads(pointer.read_text())
        return RemoteStore(where["uri"], where["name"])
    # The name must be the run's own, and the same at every start.
    name = f"{folder.parent.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    store = RemoteStore(uri, name, writable=worker.is_rank_zero)
    if worker.is_rank_zero:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(pointer, json.dumps({"uri": uri, "name": name}))
    return store


def save_interval_s(save_s: float, failure_every_s: float) -> float:
    """Seconds between saves that lose the least time to saving and to work done again.

    Young's square root (CACM 1974) for a save that stops training for `save_s`, but at least so
    long that saving takes no more than 1 % of the time.
    """
    return max(math.sqrt(2 * save_s * failure_every_s), 100 * save_s)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> tuple[int, dict[str, float]]:
    """Put a checkpoint's state into `model` and `optimizer`; returns its steps and `numbers`.

    Collective over `group`. Raises CheckpointError if it is damaged or does not fit. Numbers take
    the dtype of the model.
    """
    manifest = read_manifest(path)
    kind = type(optimizer).__name__
    if manifest["optimizer"] != kind:
        raise CheckpointError(
            f"{path}: does not fit the optimizer: it is of {manifest['optimizer']}, not {kind}"
        )
    found = shards.shapes(path)
    state = _matching_tensors(path, found, model)
    weights = {name: weight for weight, name in _trainable_names(model).items()}
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for key in found:
        if not key.startswith(OPTIMIZER_PREFIX):
            continue
        name, _, part = key.removeprefix(OPTIMIZER_PREFIX).rpartition("/")
        if name not in moments:
            raise CheckpointError(f"{path}: does not fit the optimizer: {name} is unknown")
        weight = weights[name]
        # Fused kernels pair a weight with its moments by their order in memory.
        moments[name][part] = state[key] = (
            torch.zeros((), device=weight.device)
            if part == "step"
            else torch.empty_like(weight, requires_grad=False)
        )
    shards.read(state, path, group)
    for name, weight in weights.items():
        optimizer.state[weight] = moments[name]
    return int(manifest["step"]), manifest["numbers"]


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights alone into `model`; raises as `load` does."""
    read_manifest(path)
    shards.read(_matching_tensors(path, shards.shapes(path), model), path, None)


def _matching_tensors(
    path: Path, found: dict[str, list[int]], model: nn.Module
) -> dict[str, Tensor]:
    """The model's own tensors under their names in a checkpoint, which has the same ones."""
    wanted = model.state_dict()
    for key in found:
        if key.startswith(MODEL_PREFIX) and key.removeprefix(MODEL_PREFIX) not in wanted:
            name = key.removeprefix(MODEL_PREFIX)
            raise CheckpointError(f"{path}: does not fit the model: {name} is unknown")
    for name, tensor in wanted.items():
        there = found.get(MODEL_PREFIX + name, "missing")
        if there != list(tensor.shape):
            raise CheckpointError(
                f"{path}: does not fit the model: {name} is {there}, not {list(tensor.shape)}"
            )
    return {MODEL_PREFIX + name: tensor for name, tensor in wanted.items()}


def _collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, include_replicated: bool
) -> dict[str, Tensor]:
    """All that steps change, by name: `model.NAME`, and `optimizer.NAME/PART` of each weight.

    Only what is sharded unless `all_of_it`: of what all workers have, such as running means, the
    first one's is what counts.
    """
    state = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    for weight, name in _trainable_names(model).items():
        for part, value in optimizer.state[weight].items():
            state[f"{OPTIMIZER_PREFIX}{name}/{part}"] = torch.as_tensor(value)
    return {k: v for k, v in state.items() if include_replicated or isinstance(v, DTensor)}


def _trainable_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The weights that are trained, with their names."""
    return {weight: name for name, weight in model.named_parameters() if weight.requires_grad}


def _file_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    whole = {**manifest, "sha256": _manifest_digest(manifest)}
    (folder / MANIFEST).write_text(json.dumps(whole))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says; CheckpointError otherwise."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_digest(manifest):
            raise CheckpointError(f"{path}: {MANIFEST} is damaged")
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path}: {name} is truncated")
            if _file_digest(path / name) != expected:
                raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 differs)")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint: {error}") from error
    return manifest


def _write_error(error: BaseException, place: str) -> BaseException:
    """A CheckpointError of one line where the disk is at fault; else what went wrong itself."""
    causes = getattr(error, "failures", {0: (error,)})  # of PyTorch's CheckpointException, by rank
    cause: BaseException = next(iter(causes.values()))[0]
    if getattr(cause, "errno", None) in DISK_FULL_ERRNOS or any(
        f"os error {n}" in str(cause) for n in DISK_FULL_ERRNOS
    ):
        return CheckpointError(f"{place}: the disk is full; the checkpoints before it are whole")
    if isinstance(cause, (OSError, SafetensorError)):
        return CheckpointError(f"{place}: cannot be written: {str(cause).splitlines()[0]}")
    return cause


def find_checkpoint(name: str, storage: Path) -> Path:
    """The newest whole checkpoint of a run, a trial or a folder of checkpoints."""
    for folder in (storage / name, Path(name)):
        for checkpoints in (folder / CHECKPOINTS, folder):
            found = Checkpoints(checkpoints).latest()
            if found is not None:
                return found
    raise SpecError(f"--from {name}: no checkpoint there")
