"""The verbs `track flush`, `track relocate` and `model register`, on what MLflow has of runs."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers

if TYPE_CHECKING:
    from trainers.spec import TrackingSpec


def add_verbs(verbs: Subparsers) -> None:
    track = verbs.add_parser("track", help="results that are not in MLflow yet")
    actions = track.add_subparsers(title="actions", metavar="ACTION", required=True)
    flush = actions.add_parser(
        "flush",
        help="send the unsent results of a run or sweep",
        description="Send MLflow the results of a run or sweep that it does not have yet, "
        "because it could not be reached.",
    )
    flush.add_argument("run", metavar="RUN|SWEEP", help="its name, or its folder")
    flush.set_defaults(command=flush_command)
    relocate = actions.add_parser(
        "relocate",
        help="find artifacts again after the project's folder was moved or copied",
        description="MLflow's SQLite file has the place of each artifact in full. Make it that of "
        "the folder mlartifacts beside the file.",
    )
    relocate.add_argument(
        "--uri", help="MLflow tracking URI; MLFLOW_TRACKING_URI, else ./mlflow.db"
    )
    relocate.set_defaults(command=relocate_command)
    model = verbs.add_parser("model", help="trained models in MLflow's model registry")
    actions = model.add_subparsers(title="actions", metavar="ACTION", required=True)
    register = actions.add_parser(
        "register",
        help="register a run's model under a name",
        description="Register the model of a finished run; a second time changes nothing.",
    )
    register.add_argument("run", metavar="RUN", help="its name, or its folder")
    register.add_argument("--name", required=True, help="name of the registered model")
    register.add_argument("--alias", help="a name for this version, such as champion")
    register.set_defaults(command=register_command)


def flush_command(args: argparse.Namespace) -> int:
    from trainers.run_folder import TRACKING, locked
    from trainers.tracking.tracker import flush

    folder, tracking = folder_and_tracking(args.run)
    with locked(folder), mlflow_errors():
        sent, refused = flush(folder / TRACKING, str(tracking.uri), tracking.experiment)
    print(f"{folder.name}: {sent:,} bytes sent" if sent else f"{folder.name}: nothing was left")
    if refused:
        print(refused)
    return 0


def relocate_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import SpecError
    from trainers.tracking.mlflow_internals import replace_places
    from trainers.tracking.preflight import moved_roots, sqlite_file
    from trainers.tracking.tracker import default_tracking_uri

    uri = args.uri or default_tracking_uri()
    file = sqlite_file(uri)
    if file is None or not file.exists():
        raise SpecError(f"--uri: must be a SQLite file, as sqlite:///mlflow.db (got {uri})")
    for old, new in moved_roots(uri).items():
        count = replace_places(file, old, new)
        print(f"{count:,} places in {old} are in {new} now")
    return 0


def register_command(args: argparse.Namespace) -> int:
    import mlflow

    from cluster.base.errors import SpecError
    from trainers.run_folder import TRACKING
    from trainers.tracking.operation_log import mlflow_run_id
    from trainers.tracking.registry import register_model

    folder, tracking = folder_and_tracking(args.run)
    run_id = mlflow_run_id(folder / TRACKING, folder.name)
    if run_id is None:
        raise SpecError(f"{folder.name}: not in MLflow yet; heliostat track flush {folder.name}")
    with mlflow_errors():
        mlflow.set_tracking_uri(str(tracking.uri))
        version = register_model(mlflow.MlflowClient(), run_id, args.name, args.alias)
    alias = f", {args.alias}: models:/{args.name}@{args.alias}" if args.alias else ""
    print(f"models:/{args.name}/{version}{alias}")
    return 0


def tracked_folder(name: str) -> Path:
    """The folder of a run or sweep, by its name in `runs` or by its path."""
    from cluster.base.errors import SpecError
    from trainers.run_folder import find_run_folder

    try:
        return find_run_folder(name, Path("runs"))
    except SpecError:
        raise SpecError(f"{name}: no such run or sweep, neither a folder nor in runs") from None


def upload_artifacts(folder: Path, part: str) -> str:
    """Upload the files in `part` of a run's folder as artifacts of its MLflow run.

    Blocks until they are there. Returns the id of the MLflow run. Raises a HeliostatError if
    MLflow cannot be reached or has no such run.
    """
    import mlflow

    from cluster.base.errors import ClusterError
    from trainers.run_folder import TRACKING
    from trainers.tracking.operation_log import mlflow_run_id

    _, tracking = folder_and_tracking(str(folder))
    run_id = mlflow_run_id(folder / TRACKING, folder.name)
    if run_id is None:
        raise ClusterError(
            f"MLflow has no run {folder.name} yet; heliostat track flush {folder.name}"
        )
    with mlflow_errors():
        mlflow.set_tracking_uri(str(tracking.uri))
        mlflow.MlflowClient().log_artifacts(run_id, str(folder / part), part)
    return run_id


def folder_and_tracking(name: str) -> "tuple[Path, TrackingSpec]":
    """The folder and tracking spec of a run or sweep. Raises ClusterError without MLflow."""
    from cluster.base.config import validate
    from cluster.base.errors import ClusterError
    from trainers.run_folder import read_spec
    from trainers.spec import TrackingSpec
    from trainers.tracking.preflight import check_access

    folder = tracked_folder(name)
    tracking = validate(TrackingSpec, read_spec(folder)["tracking"], "tracking.")
    unreachable = check_access(str(tracking.uri), tracking.experiment)
    if unreachable:
        raise ClusterError(unreachable.partition(";")[0])
    return folder, tracking


@contextlib.contextmanager
def mlflow_errors() -> Iterator[None]:
    """Convert errors of MLflow to a ClusterError of one line."""
    from cluster.base.errors import ClusterError, HeliostatError

    try:
        yield
    except HeliostatError:
        raise
    except Exception as error:
        raise ClusterError(f"MLflow: {error}".splitlines()[0]) from error
