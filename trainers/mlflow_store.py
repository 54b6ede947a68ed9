"""What is tracked, said to MLflow: every operation may be said twice and counts once."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.files import cache_folder

SIGNATURE = "signature.json"
"""In an exported model: dtype and shape of its input and output."""

RUN_TAG = "heliostat.run"


class MlflowStore:
    """The operations of the spool, said to MLflow. Each may be said twice."""

    def __init__(self, uri: str, experiment: str) -> None:
        # MLflow's own defaults block a call for four minutes when the server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._uri, self._experiment = uri, experiment
        self.identities: dict[str, str] = {}
        """Our own name for each run, by key: what finds a run again that MLflow made for us."""
        self.new: set[str] = set()
        """Keys of runs that nobody has tried to make; all others are looked for first."""
        self._run_ids: dict[str, str] = {}
        self._connection: Any = None
        self._experiment_id = ""

    def _client(self) -> Any:
        if self._connection is None:
            import mlflow
            from filelock import FileLock

            mlflow.set_tracking_uri(self._uri)
            client = mlflow.MlflowClient()
            # Processes that make a fresh SQLite store together break each other's migrations.
            with FileLock(cache_folder() / "mlflow.lock"):
                found = client.get_experiment_by_name(self._experiment)
                self._experiment_id = (
                    found.experiment_id if found else self._make_experiment(client)
                )
            self._connection = client
        return self._connection

    def _make_experiment(self, client: Any) -> str:
        location = None
        if self._uri.startswith("sqlite:///"):
            database = Path(self._uri.removeprefix("sqlite:///")).resolve()
            location = (database.parent / "mlartifacts").as_uri()
        # Without it MLflow's pages open on its tools for language-model traces.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self._experiment, location, kind))

    def _run_id(self, key: str) -> str:
        """MLflow's id of a run; looked up by our tag, since making a run is not idempotent."""
        if key not in self._run_ids:
            client = self._client()
            found = client.search_runs(
                [self._experiment_id], f"tags.`{RUN_TAG}` = '{self.identities[key]}'", max_results=1
            )
            if not found:
                raise LookupError(f"MLflow has no run {key}")
            self._run_ids[key] = found[0].info.run_id
        return self._run_ids[key]

    def send(self, operation: dict[str, Any]) -> None:
        getattr(self, f"_send_{operation['do']}")(operation)

    def _send_start(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Param

        client, key = self._client(), operation["key"]
        try:
            if key in self.new:
                self.new.remove(key)
                raise LookupError
            run_id = self._run_id(key)
        except LookupError:
            tags = {**operation["tags"], RUN_TAG: operation["id"], "heliostat.key": key}
            if operation["parent"] is not None:
                tags["mlflow.parentRunId"] = self._run_id(operation["parent"])
            name = key.rpartition("/")[2]
            run = client.create_run(self._experiment_id, tags=tags, run_name=name)
            run_id = self._run_ids[key] = run.info.run_id
        params = [Param(name, _text(value)) for name, value in operation["params"].items()]
        client.log_batch(run_id, params=params)

    def _send_resume(self, operation: dict[str, Any]) -> None:
        self._client().update_run(self._run_id(operation["run"]), status="RUNNING")
        self._send_tag(operation)

    def _send_tag(self, operation: dict[str, Any]) -> None:
        client, run_id = self._client(), self._run_id(operation["run"])
        for name, value in operation["tags"].items():
            client.set_tag(run_id, name, value)

    def _send_log(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, at, step) for name, value, step, at in operation["rows"]]
        self._client().log_batch(self._run_id(operation["run"]), metrics=metrics)

    def _send_finish(self, operation: dict[str, Any]) -> None:
        self._send_tag(operation)
        run_id = self._run_id(operation["run"])
        self._client().set_terminated(run_id, operation["status"], operation["at"])

    def _send_artifact(self, operation: dict[str, Any]) -> None:
        self._client().log_artifact(self._run_id(operation["run"]), operation["path"])

    def _send_model(self, operation: dict[str, Any]) -> None:
        self._client()
        run_id = self._run_id(operation["run"])
        if not self._model_of(run_id):
            _log_model(Path(operation["folder"]), run_id)

    def _model_of(self, run_id: str) -> str | None:
        client = self._client()
        found = client.search_logged_models(
            [self._experiment_id], filter_string=f"source_run_id = '{run_id}'", max_results=1
        )
        return f"models:/{found[0].model_id}" if found else None

    def read(self, key: str) -> dict[str, Any]:
        client, run_id = self._client(), self._run_id(key)
        run = client.get_run(run_id)
        return {
            "run_id": run_id,
            "experiment_id": run.info.experiment_id,
            "status": run.info.status,
            "metrics": dict(run.data.metrics),
            "model_uri": self._model_of(run_id),
        }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _log_model(folder: Path, run_id: str) -> None:
    """Keep an exported model with an MLflow run, as a model of its own."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    tensors = json.loads((folder / SIGNATURE).read_text())
    schemas = {
        name: Schema([TensorSpec(np.dtype(tensor["dtype"]), tuple(tensor["shape"]))])
        for name, tensor in tensors.items()
    }
    signature = ModelSignature(schemas["input"], schemas.get("output")) if schemas else None
    with mlflow.start_run(run_id=run_id):
        mlflow.pyfunc.log_model(
            name="model",
            loader_module="trainers.export",
            data_path=str(folder),
            signature=signature,
            pip_requirements=[f"{name}=={version(name)}" for name in ("heliostat", "torch")],
        )
