"""The operation log's operations as calls of MLflow. Each may be sent twice and counts once."""

import math
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.base.files import cache_folder
from trainers.tracking.bulk_writer import KEY_TAG, RUN_TAG, BulkWriter, KnownRuns, name_of
from trainers.tracking.mlflow_internals import (
    EXPERIMENT_KIND_TAGS,
    SqlRuns,
    create_sqlite_tables,
)
from trainers.tracking.mlflow_limits import (
    AllowedNames,
    NumberOutOfRangeError,
    as_text,
    check_range,
    shortened,
)
from trainers.tracking.operation_log import END_TAGS
from trainers.tracking.preflight import (
    ARTIFACTS,
    artifact_problem,
    deleted_experiment_message,
    mask_password,
    sqlite_file,
)
from trainers.tracking.registry import log_model, logged_models

REQUEST_TIMEOUT_S = 20


class UnknownRunError(Exception):
    """MLflow has no such run."""


class MissingFileError(Exception):
    """A file or folder that should be kept with a run is gone."""


class MisplacedError(Exception):
    """MLflow would keep a file where it is not looked for, or not keep it at all."""


class MlflowStore:
    """Sends operations to MLflow. Two threads may use it: one that sends, one that reads."""

    def __init__(self, uri: str, experiment: str) -> None:
        # With its own retries MLflow would block for minutes. And it would repeat a request whose
        # response was lost, also the one that creates a run; we search for the run first.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_S))
        self._uri, self._experiment = uri, experiment
        self.run_tags: dict[str, str] = {}
        """Unique value of each run's `heliostat.run` tag, by key. By it the run is found again in
        MLflow after a response was lost."""
        self.new_runs: set[str] = set()
        """Keys of runs that were never requested. All others are searched for before they are
        created."""
        self.run_ids: dict[str, str] = {}
        """MLflow's ids of the runs that are known to exist there, by key."""
        self.on_run_created: Callable[[str, str], None] = lambda key, run_id: None
        """Called with the key and MLflow's id of each run when it is known to exist there."""
        self._created_once: set[str] = set()
        """Keys of runs whose create request succeeded at the first attempt, so that no duplicate
        can exist."""
        self._names = AllowedNames()
        known = KnownRuns(self.run_ids, self.new_runs, self._created_once, self._names)
        self._bulk = BulkWriter(known, self._run_id, self._remember)
        self._tags_set_once: defaultdict[str, set[str]] = defaultdict(set)
        self._lock = threading.RLock()
        """Held while the connection is made and while a run is looked up."""
        self._connection: Any = None
        self._experiment_id = ""
        self._artifact_location = ""

    def _client(self) -> Any:
        with self._lock:
            if self._connection is None:
                self._connection = self._connect()
            return self._connection

    def _connect(self) -> Any:
        import mlflow

        mlflow.set_tracking_uri(self._uri)
        file = sqlite_file(self._uri)
        create_database(self._uri)
        # Processes that create a database's tables together break each other's migrations.
        with FileLock(f"{file}.lock" if file else cache_folder() / "mlflow.lock"):
            client = mlflow.MlflowClient()
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                found = client.get_experiment(self._create_experiment(client))
            self._experiment_id = found.experiment_id
            self._artifact_location = found.artifact_location
        if found.lifecycle_stage == "deleted":
            raise RuntimeError(deleted_experiment_message(self._experiment, found.experiment_id))
        return client

    def _create_experiment(self, client: Any) -> str:
        file = sqlite_file(self._uri)
        location = (file.parent / ARTIFACTS).as_uri() if file else None
        return str(client.create_experiment(self._experiment, location, EXPERIMENT_KIND_TAGS))

    def _run_id(self, key: str) -> str:
        """MLflow's id of a run; found by our tag, since creating a run is not idempotent."""
        with self._lock:
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
        """The runs created for `key`, deleted ones too; one if no response was lost."""
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

    def send_in_bulk(self, operations: Sequence[dict[str, Any]]) -> int:
        """Write the first operations into MLflow's database in one transaction; how many it took.

        0 where MLflow is a server, or where something is wrong with one of them: `send` finds out
        what.
        """
        return self._bulk.write(operations, lambda: SqlRuns(self._client(), self._experiment_id))

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
        params = {k: mask_password(as_text(value)) for k, value in operation["params"].items()}
        short = shortened("parameters", params)
        entities = [Param(self._allowed_name(key, "param", k), v) for k, v in short.items()]
        tags = shortened("tags", operation["tags"])
        client.log_batch(run_id, (), entities, [RunTag(*tag) for tag in tags.items()])

    def _create_run(self, operation: dict[str, Any]) -> str:
        client, key = self._client(), operation["key"]
        tags = {RUN_TAG: operation["id"], KEY_TAG: key}
        if operation["parent"] is not None:
            tags["mlflow.parentRunId"] = self._run_id(operation["parent"])
        try:
            run = client.create_run(self._experiment_id, operation["at"], tags, name_of(key))
        except Exception as error:  # never dropped: without its run nothing else can be sent
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        run_id = str(run.info.run_id)
        self._remember(key, run_id)
        return run_id

    def _send_made(self, operation: dict[str, Any]) -> None:
        """Our own record of the run's id; not for MLflow."""

    def _send_rewind(self, operation: dict[str, Any]) -> None:
        """For those who read the log: MLflow deletes no points."""

    def _send_resume(self, operation: dict[str, Any]) -> None:
        client, run_id = self._client(), self._run_id(operation["run"])
        client.update_run(run_id, status="RUNNING")
        for name in set(END_TAGS) & client.get_run(run_id).data.tags.keys():
            client.delete_tag(run_id, name)
        self._send_tag(operation)

    def _send_tag(self, operation: dict[str, Any]) -> None:
        self._client()
        self._set_tags(self._run_id(operation["run"]), operation["tags"])

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        for name, value in shortened("tags", tags).items():
            self._connection.set_tag(run_id, name, value)

    def claim_names(self, key: str, metrics: Iterable[str]) -> None:
        """Give metrics that were sent before the names that they have in MLflow."""
        for name in metrics:
            self._names.get(key, "metric", name)

    def forget(self, key: str) -> None:
        """Drop what is kept of a run for its next metrics; its names must be claimed again."""
        self._names.forget(key)
        self._created_once.discard(key)
        self._tags_set_once.pop(self.run_ids.get(key, ""), None)

    def accepts(self, key: str) -> bool:
        """Whether MLflow takes something for a run now: a tag that the run has already."""
        try:
            self._client().set_tag(self._run_id(key), KEY_TAG, key)
        except Exception:
            return False
        return True

    def _allowed_name(self, key: str, kind: str, name: str) -> str:
        """A name that MLflow accepts; a tag of the run has the original if it is another one."""
        allowed = self._names.get(key, kind, name)
        if allowed != name:
            self._set_tag_once(self._run_id(key), f"heliostat.renamed.{allowed}", name)
        return allowed

    def _set_tag_once(self, run_id: str, tag: str, text: str) -> None:
        """Set a tag that does not change; only the first call is a request."""
        if tag not in self._tags_set_once[run_id]:
            self._connection.set_tag(run_id, tag, text)
            self._tags_set_once[run_id].add(tag)

    def _send_log(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        client, key = self._client(), operation["run"]
        run_id, points = self._run_id(key), operation["rows"]
        # In the log's order, also where a point is refused below.
        self.claim_names(key, (point.name for point in points))
        check_range(points)
        metrics = [
            Metric(self._allowed_name(key, "metric", name), value, timestamp_ms, step)
            for name, value, step, timestamp_ms in points
        ]
        client.log_batch(run_id, metrics=metrics)
        infinite = {point.name for point in points if math.isinf(point.value)}
        for name in sorted(infinite):
            tag = f"heliostat.infinite.{self._allowed_name(key, 'metric', name)}"
            self._set_tag_once(run_id, tag, "infinite at some steps, where MLflow has 1.797e308")

    def _send_finish(self, operation: dict[str, Any]) -> None:
        self._send_tag(operation)
        key, run_id = operation["run"], self._run_id(operation["run"])
        self._client().set_terminated(run_id, operation["status"], operation["at"])
        if key not in self._created_once:
            for run in self._find_runs(key):  # empty duplicates: their response was lost
                if run.info.run_id != run_id and run.info.lifecycle_stage == "active":
                    self._client().delete_run(run.info.run_id)

    def _send_artifact(self, operation: dict[str, Any]) -> None:
        client, path = self._client_for_files(), Path(operation["path"])
        if not path.exists():
            raise MissingFileError(f"{path} is gone")
        run_id = self._run_id(operation["run"])
        if path.suffix == ".yaml":  # a spec, which may name a database with its password
            client.log_text(run_id, mask_password(path.read_text()), path.name)
        else:
            client.log_artifact(run_id, str(path))

    def _send_text(self, operation: dict[str, Any]) -> None:
        """A parameter or tag that is too long for MLflow."""
        client = self._client_for_files()
        client.log_text(self._run_id(operation["run"]), operation["text"], operation["file"])

    def _send_model(self, operation: dict[str, Any]) -> None:
        client, folder = self._client_for_files(), Path(operation["folder"])
        if not folder.exists():
            raise MissingFileError(f"{folder} is gone")
        log_model(client, self._run_id(operation["run"]), folder)

    def _client_for_files(self) -> Any:
        client = self._client()
        problem = artifact_problem(self._uri, self._artifact_location)
        if problem:
            raise MisplacedError(problem)
        return client

    def read_run(self, key: str) -> dict[str, Any]:
        """`run_id`, `experiment_id`, `status`, newest `metrics` and `model_uri` of a run."""
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


def is_permanent_error(error: Exception) -> bool:
    """Whether MLflow would refuse the same operation again, however often it is sent.

    A plain ValueError is none: MLflow also raises it for an environment variable that it cannot
    read, and nothing may be left out for that.
    """
    if getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
        return True
    return isinstance(error, (UnknownRunError, MissingFileError, NumberOutOfRangeError))


def create_database(uri: str) -> None:
    """Create the SQLite store at `uri` if it is not there. It appears with all its tables.

    MLflow creates them one by one, and another process that opens the file meanwhile does so too;
    of eight processes, seven failed, and so did one of two.
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
        staging = Path(folder) / file.name
        create_sqlite_tables(staging, file.parent / ARTIFACTS)
        staging.rename(file)
