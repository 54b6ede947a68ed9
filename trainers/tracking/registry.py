"""Exported models in MLflow: kept with their run, and registered under a name.

Nothing in them is a pickle. They bring the code that builds them, so that whoever loads them with
`mlflow.pyfunc.load_model` or `mlflow models serve` need not have Heliostat.
"""

import ast
import json
import tempfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from cluster.base.errors import HeliostatError
from trainers.model_files import CODE, EXAMPLE, SIGNATURE

REQUIRED_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "ruamel.yaml",
    "pyarrow",
    "filelock",
)
PACKAGE = Path(__file__).parents[1]


def logged_models(client: Any, run: Any) -> dict[str, bool]:
    """The URIs of a run's logged models, newest first, and whether each is whole."""
    query = f"source_run_id = '{run.info.run_id}'"
    found = client.search_logged_models([run.info.experiment_id], filter_string=query)
    return {f"models:/{model.model_id}": str(model.status) == "READY" for model in found}


def log_model(client: Any, run_id: str, folder: Path) -> None:
    """Keep an exported model with an MLflow run, as a model of its own. Does it once."""
    run = client.get_run(run_id)
    begun = logged_models(client, run)
    if any(begun.values()):
        return
    if begun:  # by a writer that was killed
        model_id = next(iter(begun)).removeprefix("models:/")
    else:
        code = {k: v for k, v in run.data.tags.items() if ".git." in k}  # the user's version of it
        tags = {**code, "heliostat.version": version("heliostat")}
        experiment, params = run.info.experiment_id, dict(run.data.params)
        model_id = client.create_logged_model(experiment, "model", run_id, tags, params).model_id
    with tempfile.TemporaryDirectory() as building:
        files = Path(building) / "model"
        _save_pyfunc(folder, files, run_id, model_id)
        client.log_model_artifacts(model_id, str(files))
    client.finalize_logged_model(model_id, "READY")


def _save_pyfunc(folder: Path, files: Path, run_id: str, model_id: str) -> None:
    """An exported model as a folder of MLflow's flavour pyfunc."""
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
    mlflow.pyfunc.save_model(
        path=str(files),
        loader_module="trainers.checkpoints.export",
        data_path=str(folder),
        code_paths=[str(PACKAGE.parent / "cluster"), str(PACKAGE)],
        signature=ModelSignature(schemas["input"], schemas.get("output")) if schemas else None,
        input_example=example,
        pip_requirements=pip_requirements(folder / CODE),
        mlflow_model=Model(run_id=run_id, model_id=model_id),
    )


def pip_requirements(code: Path) -> list[str]:
    """What a model needs installed, at the versions here, with what the user's code imports."""
    imported = set()
    for path in code.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    of_module = packages_distributions() if imported else {}
    names = {name for module in imported for name in of_module.get(module, ())}
    names -= {"heliostat"}
    return sorted({*map(_pinned_requirement, REQUIRED_PACKAGES), *map(_pinned_requirement, names)})


def _pinned_requirement(name: str) -> str:
    """Without the local part, such as +cpu, which package indexes do not have."""
    try:
        return f"{name}=={version(name).partition('+')[0]}"
    except PackageNotFoundError:  # loaded where the distribution is not known by this name
        return name


def register_model(client: Any, run_id: str, name: str, alias: str | None) -> int:
    """Register a run's model under `name`, once; returns its version. `alias` then points to it."""
    from mlflow.exceptions import MlflowException

    whole = [uri for uri, ready in logged_models(client, client.get_run(run_id)).items() if ready]
    if not whole:
        raise HeliostatError(f"the run {run_id} has no model in MLflow; only a finished run has")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    model_id = whole[0].removeprefix("models:/")
    found = (
        known[0]
        if known
        else client.create_model_version(name, whole[0], run_id, model_id=model_id)
    )
    if alias:
        client.set_registered_model_alias(name, alias, str(found.version))
    return int(found.version)
