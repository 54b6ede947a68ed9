"""What is tracked, said to MLflow: every operation may be said twice and counts once."""

import json
import math
import os
import posixpath
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.base.files import cache_folder
from trainers.tracking.preflight import deleted_experiment_message, mask_password, sqlite_file
from trainers.tracking.registry import log_model, logged_models

RUN_TAG = "heliostat.run"
MAX_LENGTH = {"parameters": 6000, "tags": 5000}
"""Characters; MLflow cuts longer parameters without a word, and refuses longer tags."""
REQUEST_TIMEOUT_S = 20


class UnknownRunError(Exception):
    """MLflow has no such run."""


class MissingFileError(Exception):
    """What was to be kept with a run is not there any more."""


class MlflowStore:
    """The operations of the spool, said to MLflow. Each may be said twice."""

    def __init__(self, uri: str, experiment: str) -> None:
        # MLflow would block for minutes. And it would repeat a request whose answer was lost,
        # also one that makes a run; we look first whether it did.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_S))
        self._uri, self._experiment = uri, experiment
        self.run_tags: dict[str, str] = {}
        """Our own name for each run, by key: what finds a run again that MLflow made for us."""
        self.new_runs: set[str] = set()
        """Keys of runs that nobody has tried to make; all others are looked for first."""
        self.run_ids: dict[str, str] = {}
        """MLflow's names of the runs that are known to be there, by key."""
        self.on_run_created: Callable[[str, str], None] = lambda key, run_id: None
        """Told of each run that MLflow has, once: its key, and MLflow's name for it."""
        self._created_once: set[str] = set()
        """Keys of runs that MLflow made when it was first asked; of others it may have made two."""
        self._tags_set_once: set[tuple[str, str]] = set()
        self._connection: Any = None
        self._experiment_id = ""

    def _client(self) -> Any:
        if self._connection is None:
            import mlflow

            mlflow.set_tracking_uri(self._uri)
            file = sqlite_file(self._uri)
            create_database(self._uri)
            # Processes that make a database's tables together break each other's migrations.
            with FileLock(f"{file}.lock" if file else cache_folder() / "mlflow.lock"):
                client = mlflow.MlflowClient()
                found = client.get_experiment_by_name(self._experiment)
                self._experiment_id = (
                    found.experiment_id if found else self._create_experiment(client)
                )
            if found is not None and found.lifecycle_stage == "deleted":
                raise RuntimeError(
                    deleted_experiment_message(self._experiment, found.experiment_id)
                )
            self._connection = client
        return self._connection

    def _create_experiment(self, client: Any) -> str:
        file = sqlite_file(self._uri)
        location = (file.parent / "mlartifacts").as_uri() if file else None
        # Without it MLflow's pages open on its tools for language-model traces.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self._experiment, location, kind))

    def _run_id(self, key: str) -> str:
        """MLflow's name of a run; looked up by our tag, since making a run is not idempotent."""
        if key not in self.run_ids:
            self._client()
            found = self._find_runs(key)
            if not found:
                raise UnknownRunError(f"MLflow has no run {key}")
            self._remember(key, found[0].info.run_id)
        return self.run_ids[key]

    def _remember(self, key: str, run_id: str) -> None:
        self.run_ids[key] = run_id
        self.on_run_created(key, run_id)

    def _find_runs(self, key: str) -> list[Any]:
        """The runs that were made for `key`, one if all went well; deleted ones too."""
        from mlflow.entities import ViewType

        if key not in self.run_tags:
            raise UnknownRunError(f"the run {key} was never started")
        query = f"tags.`{RUN_TAG}` = '{self.run_tags[key]}'"
        experiments = [self._experiment_id]
        order = ["attributes.start_time ASC", "attributes.run_id ASC"]
        found = self._client().search_runs(experiments, query, ViewType.ALL, 10, order)
        return list(found)

    def send(self, operation: dict[str, Any]) -> None:
        getattr(self, f"_send_{operation['do']}")(operation)

    def _send_start(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        client, key = self._client(), operation["key"]
        if key in self.new_runs:
            self.new_runs.remove(key)
            run_id = self._create_run(operation)
            self._created_once.add(key)
        else:
            try:
                run_id = self._run_id(key)
            except UnknownRunError:
                run_id = self._create_run(operation)
        params = {k: mask_password(_as_text(value)) for k, value in operation["params"].items()}
        short = self._shortened(run_id, "parameters", params)
        entities = [Param(self._allowed_name(run_id, k), value) for k, value in short.items()]
        tags = self._shortened(run_id, "tags", operation["tags"])
        client.log_batch(run_id, (), entities, [RunTag(*tag) for tag in tags.items()])

    def _create_run(self, operation: dict[str, Any]) -> str:
        client, key = self._client(), operation["key"]
        tags = {RUN_TAG: operation["id"], "heliostat.key": key}
        if operation["parent"] is not None:
            tags["mlflow.parentRunId"] = self._run_id(operation["parent"])
        try:
            name = key.rpartition("/")[2]
            run = client.create_run(self._experiment_id, operation["at"], tags, name)
        except Exception as error:  # without its run nothing else can be sent: never given up
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        run_id = str(run.info.run_id)
        self._remember(key, run_id)
        return run_id

    def _send_made(self, operation: dict[str, Any]) -> None:
        """Our own record of what MLflow answered."""

    def _send_resume(self, operation: dict[str, Any]) -> None:
        self._client().update_run(self._run_id(operation["run"]), status="RUNNING")
        self._send_tag(operation)

    def _send_tag(self, operation: dict[str, Any]) -> None:
        self._client()
        self._set_tags(self._run_id(operation["run"]), operation["tags"])

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        for name, value in self._shortened(run_id, "tags", tags).items():
            self._connection.set_tag(run_id, name, value)

    def _shortened(self, run_id: str, kind: str, texts: Mapping[str, str]) -> dict[str, str]:
        """The texts as MLflow takes them; what is too long for it is kept whole as an artifact."""
        short = dict(texts)
        for name, text in texts.items():
            if len(text) > MAX_LENGTH[kind]:
                place = f"{kind}/{re.sub('[^A-Za-z0-9_.-]', '_', name)}.txt"
                self._connection.log_text(run_id, text, place)
                short[name] = f"{text[:200]}... ({len(text)} characters, whole in {place})"
        return short

    def _allowed_name(self, run_id: str, name: str) -> str:
        """A name that MLflow takes; a run that has another one says so in a tag."""
        allowed = re.sub(r"[^/\w.\- :]", "_", name)
        allowed = posixpath.normpath(allowed).lstrip("./")[:200] or "_"
        if allowed != name:
            self._set_tag_once(run_id, f"heliostat.renamed.{allowed}", name)
        return allowed

    def _set_tag_once(self, run_id: str, tag: str, text: str) -> None:
        """Say something about a run that stays as it is."""
        if (run_id, tag) not in self._tags_set_once:
            self._connection.set_tag(run_id, tag, text)
            self._tags_set_once.add((run_id, tag))

    def _send_log(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        client, run_id = self._client(), self._run_id(operation["run"])
        metrics = [
            Metric(self._allowed_name(run_id, name), value, at, step)
            for name, value, step, at in operation["rows"]
        ]
        client.log_batch(run_id, metrics=metrics)
        infinite = {row[0] for row in operation["rows"] if math.isinf(row[1])}
        for name in sorted(infinite):
            tag = f"heliostat.infinite.{self._allowed_name(run_id, name)}"
            self._set_tag_once(run_id, tag, "infinite at some steps, where MLflow has 1.797e308")

    def _send_finish(self, operation: dict[str, Any]) -> None:
        self._send_tag(operation)
        key, run_id = operation["run"], self._run_id(operation["run"])
        self._client().set_terminated(run_id, operation["status"], operation["at"])
        if key not in self._created_once:
            for run in self._find_runs(key):  # made by requests whose answer was lost; empty
                if run.info.run_id != run_id and run.info.lifecycle_stage == "active":
                    self._client().delete_run(run.info.run_id)

    def _send_artifact(self, operation: dict[str, Any]) -> None:
        client, path = self._client(), Path(operation["path"])
        if not path.exists():
            raise MissingFileError(f"{path} is gone")
        run_id = self._run_id(operation["run"])
        if path.suffix == ".yaml":  # a spec, which may name a database with its password
            client.log_text(run_id, mask_password(path.read_text()), path.name)
        else:
            client.log_artifact(run_id, str(path))

    def _send_model(self, operation: dict[str, Any]) -> None:
        client, folder = self._client(), Path(operation["folder"])
        if not folder.exists():
            raise MissingFileError(f"{folder} is gone")
        log_model(client, self._run_id(operation["run"]), folder)

    def read_run(self, key: str) -> dict[str, Any]:
        client, run_id = self._client(), self._run_id(key)
        run = client.get_run(run_id)
        models = logged_models(client, run)
        return {
            "run_id": run_id,
            "experiment_id": run.info.experiment_id,
            "status": run.info.status,
            "metrics": dict(run.data.metrics),
            "model_uri": next((uri for uri, ready in models.items() if ready), None),
        }


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def is_permanent_error(error: Exception) -> bool:
    """Whether MLflow would refuse the same operation again, however often it is asked."""
    final = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
    if getattr(error, "error_code", None) in final:
        return True
    # The last two are of numbers that do not fit in a request; broken answers are subclasses.
    return isinstance(error, (UnknownRunError, MissingFileError, OverflowError)) or (
        type(error) is ValueError
    )


def create_database(uri: str) -> None:
    """Make the SQLite store at `uri` if it is not there. It appears with all its tables.

    MLflow makes them one by one, and another process that opens the file meanwhile does so too;
    of eight, seven failed, and so did one of two.
    """
    file = sqlite_file(uri)
    if file is None or file.exists():
        return
    with (
        FileLock(f"{file}.lock"),
        tempfile.TemporaryDirectory(dir=file.parent, prefix=".mlflow-") as folder,
    ):
        if file.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        building = Path(folder) / file.name
        store = SqlAlchemyStore(f"sqlite:///{building}", (file.parent / "mlartifacts").as_uri())
        store.engine.dispose()
        building.rename(file)
