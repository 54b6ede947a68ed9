"""Trained models that others can load: weights as safetensors, and the spec of the network.

An exported model is a folder with `model.safetensors`, `spec.yaml` (the spec's sections
`workload`, `data` and `model`), `signature.json` (dtypes and shapes), `example.safetensors` (an
input and its output) and, for a user's own workload, its source under `code/`. In MLflow it is a
`pyfunc` model. It holds no pickle, and no pickle is ever read.
"""

import contextlib
import inspect
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_file
from safetensors.torch import save_model as save_weights
from torch import nn

from cluster.base.config import read_yaml, validate, write_yaml
from cluster.base.errors import CheckpointError
from cluster.base.files import commit_folder
from trainers.checkpoints.state import load_model_weights
from trainers.model_files import CODE, EXAMPLE, SIGNATURE
from trainers.precision import complex_as_pairs, convert_weights, weights_dtype
from trainers.run_folder import MODEL
from trainers.spec import RunSpec
from trainers.workload import SHIPPED_WORKLOADS, Workload, load_workload, model_dtype

WEIGHTS, SPEC = "model.safetensors", "spec.yaml"
PICKLE_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


def export_model(folder: Path, spec: RunSpec, workload: Workload, checkpoint: Path) -> None:
    """Export the model of a checkpoint to `folder`, replacing what was there.

    Raises CheckpointError if the checkpoint holds a pickle.
    """
    refuse_pickles(checkpoint)
    network = convert_weights(workload.build(), weights_dtype(spec.train))
    load_model_weights(checkpoint, network)
    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    with complex_as_pairs(network):
        save_weights(network, str(building / WEIGHTS))
    sections = spec.model_dump(mode="json", include={"workload", "data", "model"})
    if spec.workload not in SHIPPED_WORKLOADS:  # the class, not the name that the spec has for it
        sections["workload"] = f"{type(workload).__module__}:{type(workload).__qualname__}"
    write_yaml(sections, building / SPEC)
    tensors = _example(workload, network)
    (building / SIGNATURE).write_text(json.dumps(_signature(tensors)))
    if tensors:
        save_file(tensors, building / EXAMPLE)
    if spec.workload not in SHIPPED_WORKLOADS:
        _copy_code(type(workload), building / CODE)
    shutil.rmtree(folder, ignore_errors=True)
    commit_folder(building, folder)


def _example(workload: Workload, network: nn.Module) -> dict[str, torch.Tensor]:
    """The workload's example as `input`, and the network's `output` for it, if they are tensors."""
    example = workload.example()
    if not isinstance(example, torch.Tensor):
        return {}
    network.eval()
    with torch.inference_mode():
        example = example.to(model_dtype(network) if example.is_floating_point() else None)
        output = network(example)
    tensors = {"input": example, "output": output}
    return {k: v.contiguous() for k, v in tensors.items() if isinstance(v, torch.Tensor)}


def _signature(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Dtype and shape of input and output; -1 is the batch dimension."""
    return {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": [-1, *value.shape[1:]]}
        for name, value in tensors.items()
    }


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError if a file in `folder` is a pickle, by its suffix or its first bytes.

    Loading a pickle runs any code that its author put there.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(9)
            # Pickle protocols 2 to 5, and the archives of torch.save. A safetensors file begins
            # with the length of its header, which can look like a protocol, and then the header.
            pickled = start[:1] == b"\x80" and start[1:2] in PICKLE_PROTOCOLS and start[8:] != b"{"
            if path.suffix in PICKLE_SUFFIXES or pickled or start.startswith(b"PK\x03\x04"):
                raise CheckpointError(
                    f"{path}: holds pickled code, which is never loaded; use safetensors"
                )


def _copy_code(workload: type[Workload], folder: Path) -> None:
    """Copy the module that defines the workload, with its package if it is in one."""
    source = inspect.getsourcefile(workload)
    if source is None:
        return
    parts = workload.__module__.split(".")
    if Path(source).name == "__init__.py":
        parts.append("__init__")
    if len(parts) == 1:
        folder.mkdir()
        shutil.copy(source, folder)
        return
    package = Path(source).parents[len(parts) - 2]
    only_python = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / package.name, ignore=only_python)


def load_model(source: str | Path) -> nn.Module:
    """Load the trained network of a run, in evaluation mode, on the CPU.

    `source` is the folder of a run or of an exported model, or MLflow's URI of the model, such as
    `models:/m-...`. Imports the code of a user's own workload. Raises CheckpointError if the
    folder holds a pickle or more than one model.
    """
    folder = Path(source)
    if not folder.is_dir():
        import mlflow

        folder = Path(mlflow.artifacts.download_artifacts(str(source)))
    folder = _find_model(folder, str(source))
    refuse_pickles(folder)
    sections = read_yaml(folder / SPEC)
    with _importing_from(folder / CODE, sections["workload"].partition(":")[0]):
        workload = load_workload(sections["workload"])
    network = workload(
        validate(workload.Data, sections["data"]), validate(workload.Model, sections["model"])
    ).build()
    try:
        convert_weights(network, _dtype(folder / WEIGHTS))
        with complex_as_pairs(network):
            load_weights(network, str(folder / WEIGHTS))
    except SafetensorError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from None
    return network.eval()


def _find_model(folder: Path, source: str) -> Path:
    """The exported model in `folder`: the folder itself, a run's `model/`, else the only one below.

    MLflow puts a model below other folders.
    """
    for place in (folder, folder / MODEL):
        if (place / WEIGHTS).is_file():
            return place
    below = [path.parent.relative_to(folder) for path in folder.rglob(WEIGHTS)]
    # A folder with a dot is an export that did not end.
    found = sorted(path for path in below if not any(part[0] == "." for part in path.parts))
    if not found:
        raise FileNotFoundError(f"{source}: no {WEIGHTS} in it")
    if len(found) > 1:
        names = ", ".join(map(str, found[:3]))
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(f"{source}: holds {len(found)} models, name one: {names}{more}")
    return folder / found[0]


@contextlib.contextmanager
def _importing_from(code: Path, module: str) -> Iterator[None]:
    """In here `module` is imported from `code`, even if another module of its name is loaded.

    So a model is built by the code that it was trained with, and two versions of the code can be
    used in one process. What was loaded before is back afterwards.
    """
    if not code.is_dir():
        yield
        return
    top = module.partition(".")[0]

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == top]

    hidden = {name: sys.modules.pop(name) for name in loaded()}
    path = list(sys.path)
    sys.path[:0] = [str(code), str(Path.cwd())]
    try:
        yield
    finally:
        sys.path[:] = path
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(hidden)


def _dtype(path: Path) -> torch.dtype:
    """The dtype of the run's weights. A model of fp32 may have some tensors of more."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    floats = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}
    return torch.float64 if dtypes & floats == {torch.float64} else torch.float32


class _Predictor:
    """The network for MLflow's pyfunc flavour: arrays in, arrays out."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def predict(self, data: npt.NDArray[Any], params: Any = None) -> npt.NDArray[Any]:
        with torch.inference_mode():
            output: torch.Tensor = self.network(torch.from_numpy(np.asarray(data)))
        return np.asarray(output)


def _load_pyfunc(path: str) -> _Predictor:
    """Load the model; called by MLflow."""
    return _Predictor(load_model(path))
