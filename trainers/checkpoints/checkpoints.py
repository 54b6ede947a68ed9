"""The checkpoints of a run: saved in the background, complete or absent, checked when read.

A checkpoint is a folder `step-00000120` with the tensors of model and optimizer by name, in one
safetensors file per worker that had any, and `manifest.json` with the size and SHA-256 of every
file. It gets its name once all files are on disk, and it holds no pickles. Learning rate and
weight decay are not in it: they are a function of the spec and the step.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster.base.errors import CheckpointError, SpecError
from trainers.checkpoints import shards
from trainers.checkpoints.attributes import Attributes, described
from trainers.checkpoints.collectives import run_on_all, run_on_rank_zero
from trainers.checkpoints.manifest import file_digest, read_manifest, write_manifest
from trainers.checkpoints.place import checkpoint_name, current_store, store_at
from trainers.checkpoints.ranking import best_checkpoints
from trainers.checkpoints.state import check_model_state, collect_state, load_checkpoint
from trainers.run_folder import CHECKPOINTS
from trainers.spec import CheckpointSpec
from trainers.stores import MANIFEST, Store, external_wait, step_of
from trainers.worker import Worker

NAME = re.compile(r"step-\d{8,}")
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
METERED = ("goodput.", "device_s")
"""What the names of the numbers begin with that a meter has counted."""
SAVE_TIMEOUT = datetime.timedelta(days=1)
"""How long workers wait for another one's files. The loss of that worker ends it sooner."""

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, written by all of its workers together."""

    def __init__(
        self, folder: Path, spec: CheckpointSpec | None = None, worker: Worker | None = None
    ) -> None:
        """The checkpoints of `folder`; collective.

        With a `spec`, which is needed for saving only, they are where it says (`store_at`).
        Otherwise they are where they are.
        """
        self._spec = spec or CheckpointSpec()
        self._worker = worker or Worker()
        self._store: Store = (
            store_at(folder, spec.uri, moves=self._worker.is_rank_zero)
            if spec
            else current_store(folder)
        )
        self._group = None
        if self._worker.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self._stage = shards.stage_with(self._worker.device.type == "cuda", self._group)
        self._attributes: Attributes | None = None
        self._writing: concurrent.futures.Future[None] | None = None
        self.taken: str | None = None
        """What `resume` took from another run's checkpoint, in a line; None if it was this run's.
        """
        self.resumed_metrics: dict[str, float] = {}
        """The evaluation that was saved with the checkpoint from which `resume` went on."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """After an error, let the save under way end: this process may train again."""
        if error is not None:
            with contextlib.suppress(Exception):
                self.wait()

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scalars: Mapping[str, float] | None = None,
        metrics: Mapping[str, float] | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Save the state after `step` steps; returns once the state is copied, not yet written.

        `scalars` are other values that the next step depends on, `metrics` the evaluation of this
        state. `before_commit` is called in the writing thread of rank 0 before the checkpoint
        gets its name. Waits for the save before this one, and raises its error. Collective.
        """
        self.wait()
        known = self._attributes is not None and self._attributes.is_of(model)
        attributes = self._attributes if known else None
        state = collect_state(model, optimizer, self._worker.is_rank_zero, attributes)
        copies = self._stage(state.tensors)
        self._worker.hardware.synchronize()
        manifest = {
            "step": step,
            "optimizer": type(optimizer).__name__,
            "numbers": dict(scalars or {}),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "buffers": state.buffers,
            "extra": state.extra,
        }
        writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = writer.submit(self._write, manifest, copies, before_commit)
        writer.shutdown(wait=False)

    def wait(self) -> None:
        """Block until the save under way is on disk; raises its error. Any thread may wait."""
        writing = self._writing
        if writing is None:
            return
        try:
            with external_wait():
                writing.result()
        finally:
            if self._writing is writing:
                self._writing = None

    def newest_step(self) -> int:
        """Steps of the latest checkpoint that is intact, 0 without one. Collective."""
        with external_wait():
            name = self._run_on_rank_zero(lambda: (path := self.latest()) and path.name)
        return step_of(name) if name else 0

    def resume(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        workload: object = None,
        changed_at: int | None = None,
    ) -> tuple[int, dict[str, float]]:
        """Load the latest checkpoint that is intact; returns its step and scalars. Collective.

        The model, and `workload`, have to be as they were built: what later differs in their plain
        attributes is saved. Any number of workers may have written the checkpoint, in any parallel
        mode. (0, {}) without one. A checkpoint after `changed_at` steps is loaded like another
        run's: the spec has changed there.
        Raises TrainingError if the model has a state that `save` cannot write.
        """
        check_model_state(model)
        self._attributes = attributes = Attributes(model, workload)
        with external_wait():
            name = self._run_on_rank_zero(lambda: (path := self.latest()) and path.name)
            if name is None:
                return 0, {}
            path = self._store.download(name)
            self.resumed_metrics = json.loads((path / MANIFEST).read_text()).get("metrics", {})
            loaded = load_checkpoint(
                path, model, optimizer, self._group, self._note_taken, workload, changed_at
            )
        if loaded[0] == changed_at:
            self.taken = None
        attributes.accept(model)
        return loaded

    def unsaved(self, model: nn.Module) -> list[str]:
        """The plain attributes that changed since this was last called, or since the last save,
        and that are not saved, as caches need not be. Notes what is to be saved.
        """
        assert self._attributes is not None
        return [described(name) for name in self._attributes.unsaved(model)]

    def _note_taken(self, line: str) -> None:
        self.taken = line

    def import_from(self, path: Path, donor: str | None = None) -> str:
        """Copy another run's checkpoint into this run; returns its name. Not collective.

        What the donor's meter has counted, and its evaluation, are not copied. This run may train
        other parts of the model, see `load_checkpoint`. `donor` is what users are told of where it
        is from, by default what its path says.
        """
        manifest = read_manifest(path)
        name = _name(manifest)
        scalars = {k: v for k, v in manifest["numbers"].items() if not k.startswith(METERED)}
        with external_wait():
            self._store.start_write(name)
            for file in manifest["files"]:
                shutil.copy(path / file, self._store.staging_dir(name))
                self._store.upload(name, file)
            content = {**manifest, "numbers": scalars, "metrics": {}}
            content["from"] = donor or _described(path)
            write_manifest(self._store.staging_dir(name), content)
            self._store.commit(name)
        return name

    def replace_by(self, path: Path, donor: str | None = None) -> None:
        """Make another run's checkpoint the only one of this run, see `import_from`."""
        imported = self.import_from(path, donor)
        for name in self._names():
            if name != imported:
                self._store.remove(name)

    def forget_copies(self) -> None:
        """Delete what this machine keeps of checkpoints that are at a URI; not collective."""
        self._store.forget_copies()

    def latest(self) -> Path | None:
        """The latest checkpoint that is intact; damaged ones are skipped with a warning."""
        with external_wait():
            return next(filter(None, map(self._validated, reversed(self._names()))), None)

    def at(self, step: int) -> Path | None:
        """The checkpoint after `step` steps, if it is there and intact."""
        with external_wait():
            return self._validated(_name({"step": step}))

    def _write(
        self,
        manifest: dict[str, Any],
        tensors: Mapping[str, Tensor],
        before_commit: Callable[[], None],
    ) -> None:
        name, store = _name(manifest), self._store
        # A checkpoint that was written before a restart would be the same again.
        if self._run_on_rank_zero(lambda: self._validated(name) is not None):
            if self._worker.is_rank_zero:
                before_commit()
            return
        try:
            self._run_on_rank_zero(lambda: store.start_write(name))
            folder = store.staging_dir(name)
            shards.write(tensors, folder, self._group)
            uploads = run_on_all(lambda: self._upload_shard(name), self._group)
            files = {file: digest for upload in uploads for file, digest in upload.items()}

            def commit() -> None:
                write_manifest(folder, {**manifest, "files": files})
                before_commit()
                store.commit(name)
                self._apply_retention()

            self._run_on_rank_zero(commit)
        except BaseException as error:
            if self._worker.is_rank_zero:
                store.abort(name)
            raise _write_error(error, store.describe(name)) from error

    def _upload_shard(self, name: str) -> dict[str, Any]:
        """Upload the file of this worker, if it wrote one; its entry in the manifest."""
        path = self._store.staging_dir(name) / shards.shard_file(self._worker.rank)
        if not path.exists():
            return {}
        digest = file_digest(path)
        self._store.upload(name, path.name)
        return {path.name: digest}

    def _run_on_rank_zero(self, action: Callable[[], Any]) -> Any:
        return run_on_rank_zero(action, self._worker.rank, self._group)

    def _names(self) -> list[str]:
        """The names of all checkpoints, by step."""
        return sorted(filter(NAME.fullmatch, self._store.names()), key=step_of)

    def _apply_retention(self) -> None:
        """Remove all but the latest checkpoints and the best by the spec's metric."""
        names = self._names()
        kept = set(names[-self._spec.keep :])
        if self._spec.keep_best:
            metrics = {
                name: json.loads(self._store.read_manifest(name))["metrics"] for name in names
            }
            kept |= set(best_checkpoints(self._spec, metrics))
        for name in names:
            if name not in kept:
                self._store.remove(name)

    def _validated(self, name: str) -> Path | None:
        """The checkpoint if it is intact. A damaged one is None with a warning, as is none.

        Raises the OSError of a store that does not answer: training would begin with another one.
        """
        if name not in self._names():
            return None
        try:
            return self._read_whole(name)
        except (CheckpointError, OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, CheckpointError) else error
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise
            reason = str(error) if isinstance(error, CheckpointError) else f"{name}: {error}"
            logger.warning("%s; passed over", reason)
            return None

    def _read_whole(self, name: str) -> Path:
        """Read a checkpoint to check it; raises CheckpointError if it is damaged."""
        path = self._store.download(name)
        try:
            read_manifest(path)
        except CheckpointError:
            if not self._store.forget_copies():
                raise
            read_manifest(self._store.download(name))
        return path


def _name(manifest: Mapping[str, Any]) -> str:
    return checkpoint_name(manifest["step"])


def _described(checkpoint: Path) -> str:
    """A checkpoint as users know it: its run, and its step."""
    return f"{checkpoint.parents[1].name}, step {step_of(checkpoint.name)}"


def _write_error(error: BaseException, place: str) -> BaseException:
    """A CheckpointError of one line for an error of the disk, otherwise the first cause."""
    causes = getattr(error, "failures", {0: (error,)})  # of PyTorch's CheckpointException, by rank
    cause: BaseException = next(iter(causes.values()))[0]
    if getattr(cause, "errno", None) in DISK_FULL_ERRNOS or any(
        f"os error {n}" in str(cause) for n in DISK_FULL_ERRNOS
    ):
        return CheckpointError(f"{place}: the disk is full; the checkpoints before it are intact")
    if isinstance(cause, (OSError, SafetensorError)):
        return CheckpointError(f"{place}: cannot be written: {str(cause).splitlines()[0]}")
    return cause


def find_checkpoint(name: str, storage: Path) -> Path:
    """The latest intact checkpoint of a run, a trial or a folder of checkpoints.

    `NAME@STEP` is the one after so many steps.
    """
    run, _, step = name.rpartition("@")
    wanted = int(step) if run and step.isdecimal() else None
    source = name if wanted is None else run
    for folder in (storage / source, Path(source)):
        for checkpoints in (folder / CHECKPOINTS, folder):
            known = Checkpoints(checkpoints)
            found = known.latest() if wanted is None else known.at(wanted)
            if found is not None:
                return found
    of_step = "" if wanted is None else f" of step {wanted}"
    raise SpecError(f"--from {name}: no checkpoint{of_step} there")
