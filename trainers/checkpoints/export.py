"""Trained models that others can load: weights as safetensors, and the spec of the network.

An exported model is a folder with `model.safetensors`, `spec.yaml` (the spec's sections
`workload`, `data` and `model`, and what of `train` decides how the network is built),
`signature.json` (dtypes and shapes), `example.safetensors` (an input and its output) and, for a
user's own workload, its source and the files that it reads under `code/`. In MLflow it is a
`pyfunc` model. It holds no pickle, and no pickle is ever read.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_file
from torch import nn

from cluster.base.config import read_yaml, validate, write_yaml
from cluster.base.errors import CheckpointError
from cluster.base.files import commit_folder
from trainers.checkpoints.attributes import Attributes
from trainers.checkpoints.buffers import as_bytes, saved_buffers
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.manifest import is_pickle
from trainers.checkpoints.shards import COMPLEX_KEY, SavedTensor, saved_tensors, storable
from trainers.checkpoints.state import MODEL_PREFIX, SavedState, load_model_weights, model_state
from trainers.checkpoints.user_code import UserCode, importing_from
from trainers.counter_rng import random_state_kept
from trainers.model_files import CODE, EXAMPLE, SIGNATURE
from trainers.run_folder import CHECKPOINTS, MODEL
from trainers.spec import RunSpec, TrainSpec
from trainers.workload import SHIPPED_WORKLOADS, Workload, load_workload, model_dtype

WEIGHTS, SPEC = "model.safetensors", "spec.yaml"
STATE_KEY = "HELIOSTAT_STATE"
"""Key of the metadata of the weights: the model's buffers and extra state, as in a checkpoint."""
BUILT_WITH = ("seed", "precision", "channels_last")
"""Fields of the spec's section `train` on which the network, as built, depends."""
MAX_FILES = 100
"""How many files of the user's an exported model may need to be loaded."""


def export_latest(folder: Path, spec: RunSpec, workload: Workload) -> list[str]:
    """Export the model of the latest checkpoint of the run in `folder`; see `export_model`."""
    latest = Checkpoints(folder / CHECKPOINTS).latest()
    assert latest is not None  # the last step is always saved
    return export_model(folder / MODEL, spec, workload, latest)


def export_model(folder: Path, spec: RunSpec, workload: Workload, checkpoint: Path) -> list[str]:
    """Export the model of a checkpoint to `folder`, replacing what was there.

    Returns lines on what it needs where it is loaded, or lacks, and cannot have with it. Raises
    CheckpointError if the checkpoint holds a pickle.
    """
    refuse_pickles(checkpoint)
    from trainers.modeling.build import build_network

    with random_state_kept():
        network = build_network(spec.train, workload)
    attributes = Attributes(network)
    load_model_weights(checkpoint, network)
    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    _save_state(network, building, attributes)
    sections = spec.model_dump(mode="json", include={"workload", "data", "model"})
    sections["train"] = spec.train.model_dump(mode="json", include=set(BUILT_WITH))
    own = spec.workload not in SHIPPED_WORKLOADS
    if own:  # the class, not the name that the spec has for it
        sections["workload"] = f"{type(workload).__module__}:{type(workload).__qualname__}"
    unsaved = _unsaved_tensors(network)
    tensors, notes = _example(workload, network)
    (building / SIGNATURE).write_text(json.dumps(_signature(tensors)))
    if tensors:
        save_file(tensors, building / EXAMPLE)
    write_yaml(sections, building / SPEC)
    if own:
        del network  # to load it takes its memory again
        notes += _add_code(building, sections, UserCode(type(workload)), unsaved)
    shutil.rmtree(folder, ignore_errors=True)
    commit_folder(building, folder)
    return notes


def _save_state(network: nn.Module, folder: Path, attributes: Attributes) -> None:
    """Write the network's tensors, with the rest of its state in the file's metadata."""
    state, extra = model_state(network, attributes)
    named = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in state.items()}
    tensors, complex_names = storable(named)
    rest = {"buffers": list(saved_buffers(network)), "extra": extra}
    metadata = {STATE_KEY: json.dumps(rest), COMPLEX_KEY: json.dumps(complex_names)}
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def _load_state(network: nn.Module, path: Path) -> None:
    """Load what `_save_state` wrote, or what an earlier release wrote."""
    with safe_open(path, framework="pt") as file:
        rest = json.loads((file.metadata() or {}).get(STATE_KEY, "null"))
    if rest is None:
        load_weights(network, str(path))
    else:
        SavedState(path, rest["buffers"], rest["extra"], prefix="").load(network)


def _unsaved_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a network's tensors that are not in its state_dict, by name."""
    saved = network.state_dict().keys()
    found = {name: buffer for name, buffer in network.named_buffers() if name not in saved}
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}".lstrip(".")] = value
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _add_code(
    folder: Path, sections: dict[str, Any], code: UserCode, unsaved: Mapping[str, torch.Tensor]
) -> list[str]:
    """Copy the user's code, and try to load the model as it will be elsewhere.

    Files that it asks for are copied too. `unsaved` are the tensors that are built anew each time
    it is loaded. Returns lines on what is wrong with it: the training is done, so nothing may raise
    here.
    """
    code.copy_modules(folder / CODE)
    for _ in range(MAX_FILES):
        try:
            with code.elsewhere() as opened:
                again = _unsaved_tensors(load_model(folder))
        except Exception as error:  # of the user's code
            if code.copy_missing(error, folder / CODE):
                continue
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            return [f"the exported model cannot be loaded in another folder: {text}"]
        outside = code.outside(opened, folder)
        moved = code.copy_named(outside, sections, folder / CODE)
        if not moved:
            lines = [f"the exported model needs {path} wherever it is loaded" for path in outside]
            other = [name for name, tensor in unsaved.items() if not _same(tensor, again.get(name))]
            return lines + [
                f"the exported model is another one each time it is loaded: {name} is not in the "
                "state_dict, and not from the run's seed; register it as a buffer"
                for name in other[:1]
            ]
        write_yaml(sections, folder / SPEC)
    return [f"the exported model needs more than {MAX_FILES} files to be loaded"]


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether two tensors are equal to the bit; nothing is said of one that is not there."""
    if other is None or {tensor.layout, other.layout} != {torch.strided}:
        return True
    kinds = [(each.shape, each.dtype, each.is_meta) for each in (tensor, other)]
    return kinds[0] == kinds[1] and (tensor.is_meta or as_bytes(tensor).equal(as_bytes(other)))


def _example(workload: Workload, network: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The workload's example as `input`, and the network's `output` for it, if they are tensors.

    And a line on why there are none, if the network cannot take the example: the training is
    done, and its model is of use without them.
    """
    try:
        example = workload.example()
        if not isinstance(example, torch.Tensor):
            return {}, []
        network.eval()
        with torch.no_grad():
            example = example.to(model_dtype(network) if example.is_floating_point() else None)
            output = network(example.clone())
    except Exception as error:  # of the user's code
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return {}, [f"the exported model has no signature: the network cannot take example: {text}"]
    found = {"input": example, "output": output}
    tensors = {
        name: tensor
        for name, tensor in found.items()
        if isinstance(tensor, torch.Tensor) and not tensor.is_complex()
    }
    return storable(tensors)[0], []


def _signature(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Dtype and shape of input and output; -1 is the batch dimension."""
    return {
        name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": [-1, *value.shape[1:]]}
        for name, value in tensors.items()
    }


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError if a file in `folder` is a pickle."""
    for path in folder.rglob("*"):
        if path.is_file() and is_pickle(path):
            raise CheckpointError(
                f"{path}: holds pickled code, which is never loaded; use safetensors"
            )


def load_model(source: str | Path) -> nn.Module:
    """Load the trained network of a run, in evaluation mode, on the CPU.

    `source` is the folder of a run or of an exported model, or MLflow's URI of the model, such as
    `models:/m-...`. Imports the code of a user's own workload; files that it reads are those
    exported with it. Raises CheckpointError if the folder holds a pickle or more than one model.
    """
    folder = Path(source)
    if not folder.is_dir():
        import mlflow

        folder = Path(mlflow.artifacts.download_artifacts(str(source)))
    folder = _find_model(folder, str(source)).absolute()
    refuse_pickles(folder)
    from trainers.modeling.build import build_network

    sections = read_yaml(folder / SPEC)
    # An earlier release did not write how the network was built.
    train = TrainSpec(**sections.get("train", {"precision": _precision(folder / WEIGHTS)}))
    with importing_from(folder / CODE), random_state_kept():
        workload = load_workload(sections["workload"])
        data = validate(workload.Data, sections["data"])
        network = build_network(train, workload(data, validate(workload.Model, sections["model"])))
    try:
        _load_state(network, folder / WEIGHTS)
    except (SafetensorError, RuntimeError) as error:
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


def _precision(path: Path) -> str:
    """The precision of a model's weights. One of fp32 may have some tensors of more."""
    dtypes = {each.dtype.to_real() for each in saved_tensors(path).values() if _is_inexact(each)}
    return "fp64" if dtypes == {torch.float64} else "fp32"


def _is_inexact(tensor: SavedTensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


class _Predictor:
    """The network for MLflow's pyfunc flavour: arrays in, arrays out."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def predict(self, data: npt.NDArray[Any], params: Any = None) -> Any:
        """The network's output for an array: an array for each tensor in it."""
        with torch.no_grad():
            # A copy: the network may change its input.
            return _as_arrays(self.network(torch.from_numpy(np.array(data))))


def _as_arrays(output: Any) -> Any:
    """The tensors of an output as numpy arrays, also within dicts, lists and tuples."""
    if isinstance(output, torch.Tensor):
        known = output.float() if output.dtype == torch.bfloat16 else output
        return known.resolve_conj().resolve_neg().numpy()
    if isinstance(output, Mapping):
        return {name: _as_arrays(value) for name, value in output.items()}
    if type(output) in (list, tuple):
        return type(output)(map(_as_arrays, output))
    return np.asarray(output)


def _load_pyfunc(path: str) -> _Predictor:
    """Load the model; called by MLflow."""
    return _Predictor(load_model(path))
