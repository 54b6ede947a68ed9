"""Exported models in MLflow: logged with their run, and registered under a name.

Nothing in them is a pickle. They contain the code that builds them, so that Heliostat need not be
installed for `mlflow.pyfunc.load_model` and `mlflow models serve`.
"""

import ast
import json
import tempfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from cluster.base.errors import HeliostatError
from trainers.model_files import CODE, EXAMPLE, SIGNATURE
from trainers.tracking.mlflow_internals import requirements_unchecked
from trainers.workload import parse_source

REQUIRED_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "ruamel.yaml",
    "pyarrow",
    "filelock",
)
"""What every model needs; packages that the user's code imports are added to it."""
TRAINERS = Path(__file__).parents[1]


MODEL_TAG, MODEL_FOLDER = "heliostat.model", "model"
"""Where a server has no logged models (MLflow 2): the tag of a run with the URI of its model, and
the folder of the model among the run's artifacts."""
HISTORY_TAG = "mlflow.log-model.history"
"""MLflow 2's tag with the models of a run, by which its pages find them."""


def logged_models(client: Any, run: Any) -> dict[str, bool]:
    """The URIs of a run's models, newest first, and whether each is complete."""
    found = _logged_models(client, run)
    if found is None:
        uri = run.data.tags.get(MODEL_TAG)
        return {uri: True} if uri else {}
    return found


def _logged_models(client: Any, run: Any) -> dict[str, bool] | None:
    """The logged models of a run; None where the server has no such thing."""
    from mlflow.exceptions import MlflowException

    query = f"source_run_id = '{run.info.run_id}'"
    try:
        found = client.search_logged_models([run.info.experiment_id], filter_string=query)
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        return None
    return {f"models:/{model.model_id}": str(model.status) == "READY" for model in found}


def log_model(client: Any, run_id: str, folder: Path) -> None:
    """Log an exported model with an MLflow run. Does nothing if the run has one already.

    A server of MLflow 2 gets it as artifacts of the run, as its own clients would send it.
    """
    run = client.get_run(run_id)
    started = _logged_models(client, run)
    if started is None:
        if MODEL_TAG not in run.data.tags:
            _log_model_as_artifacts(client, run_id, folder)
        return
    if any(started.values()):
        return
    if started:  # by a writer that was killed before the model was complete
        model_id = next(iter(started)).removeprefix("models:/")
    else:
        code = {k: v for k, v in run.data.tags.items() if ".git." in k}  # the user's commit
        tags = {**code, "heliostat.version": version("heliostat")}
        experiment, params = run.info.experiment_id, dict(run.data.params)
        model_id = client.create_logged_model(experiment, "model", run_id, tags, params).model_id
    with tempfile.TemporaryDirectory() as staging:
        files = Path(staging) / "model"
        _save_pyfunc(folder, files, run_id, model_id=model_id)
        client.log_model_artifacts(model_id, str(files))
    client.finalize_logged_model(model_id, "READY")


def _log_model_as_artifacts(client: Any, run_id: str, folder: Path) -> None:
    """The tags come last: a writer that is killed before begins again."""
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as staging:
        files = Path(staging) / "model"
        _save_pyfunc(folder, files, run_id, artifact_path=MODEL_FOLDER)
        client.log_artifacts(run_id, str(files), MODEL_FOLDER)
        history = json.dumps([Model.load(str(files)).get_tags_dict()])
    client.set_tag(run_id, HISTORY_TAG, history)
    client.set_tag(run_id, MODEL_TAG, f"runs:/{run_id}/{MODEL_FOLDER}")


def _save_pyfunc(folder: Path, files: Path, run_id: str, **place: str) -> None:
    """Write an exported model as a folder of MLflow's pyfunc flavour.

    `place` is where it will be: `model_id`, or `artifact_path` among the run's artifacts.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec
    from safetensors.numpy import load_file

    tensors = json.loads((folder / SIGNATURE).read_text())
    schemas = {
        name: Schema([TensorSpec(np.dtype(tensor["dtype"]), tuple(tensor["shape"]))])
        for name, tensor in tensors.items()
    }
    example = load_file(folder / EXAMPLE)["input"] if (folder / EXAMPLE).exists() else None
    with requirements_unchecked():
        mlflow.pyfunc.save_model(
            path=str(files),
            loader_module="trainers.checkpoints.export",
            data_path=str(folder),
            code_paths=[str(TRAINERS.parent / "cluster"), str(TRAINERS)],
            signature=ModelSignature(schemas["input"], schemas.get("output")) if schemas else None,
            input_example=example,
            pip_requirements=pip_requirements(folder / CODE),
            mlflow_model=Model(run_id=run_id, **place),
        )


def pip_requirements(code: Path) -> list[str]:
    """The packages that a model needs, pinned to the versions installed here.

    They include the packages that the user's code in `code` imports.
    """
    imported = set()
    for path in code.rglob("*.py"):
        for node in ast.walk(parse_source(path)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    of_module = packages_distributions() if imported else {}
    names = {name for module in imported for name in of_module.get(module, ())}
    names -= {"heliostat"}
    return sorted({*map(_pinned_requirement, REQUIRED_PACKAGES), *map(_pinned_requirement, names)})


def _pinned_requirement(name: str) -> str:
    """Without the local part of the version, such as +cpu, which package indexes do not have."""
    try:
        return f"{name}=={version(name).partition('+')[0]}"
    except PackageNotFoundError:  # a model loaded where the distribution has another name
        return name


def register_model(client: Any, run_id: str, name: str, alias: str | None) -> int:
    """Register a run's model under `name`, once, and point `alias` to it; returns its version."""
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    ready = [uri for uri, complete in logged_models(client, run).items() if complete]
    if not ready:
        raise HeliostatError(f"the run {run_id} has no model in MLflow; only a finished run has")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if ready[0].startswith("models:/"):
        source, model_id = ready[0], ready[0].removeprefix("models:/")
    else:
        source, model_id = f"{run.info.artifact_uri}/{MODEL_FOLDER}", None
    found = (
        known[0] if known else client.create_model_version(name, source, run_id, model_id=model_id)
    )
    if alias:
        client.set_registered_model_alias(name, alias, str(found.version))
    return int(found.version)
