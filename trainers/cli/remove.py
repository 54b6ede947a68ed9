"""The verb `remove`: deletes a run or sweep with all that belongs to it."""

import argparse
from pathlib import Path

from cluster.cli.options import Subparsers


def add_verbs(verbs: Subparsers) -> None:
    remove = verbs.add_parser(
        "remove",
        help="delete a run or sweep, so that its name is free",
        description="Delete a run or sweep: its folder, its checkpoints wherever they are, and its "
        "MLflow runs, which `mlflow runs restore` brings back. Data sets stay.",
    )
    remove.add_argument("name", metavar="RUN|SWEEP", help="its name, or its folder")
    remove.set_defaults(command=remove_command)


def remove_command(args: argparse.Namespace) -> int:
    import secrets
    import shutil

    from trainers.checkpoints.place import current_store
    from trainers.cli.track import tracked_folder
    from trainers.run_folder import CHECKPOINTS, TRIALS, display_path, locked

    folder = tracked_folder(args.name)
    with locked(folder):
        in_mlflow = _delete_in_mlflow(folder)
        for owner in (folder, *folder.glob(f"{TRIALS}/*")):
            current_store(owner / CHECKPOINTS).clear()
        removed = folder.rename(folder.with_name(f".{folder.name}-{secrets.token_hex(4)}"))
        shutil.rmtree(removed)
    print(f"{display_path(folder)} is removed{in_mlflow}")
    return 0


def _delete_in_mlflow(folder: Path) -> str:
    """Delete the MLflow runs of a run or sweep; returns what was done, for the user."""
    from cluster.base.errors import HeliostatError
    from trainers.cli.track import folder_and_tracking, mlflow_errors
    from trainers.run_folder import TRACKING
    from trainers.tracking.operation_log import mlflow_run_ids

    run_ids = mlflow_run_ids(folder / TRACKING)
    if not run_ids:
        return ""
    try:
        _, tracking = folder_and_tracking(str(folder))
        with mlflow_errors():
            import mlflow

            mlflow.set_tracking_uri(str(tracking.uri))
            client = mlflow.MlflowClient()
            for run_id in run_ids.values():
                if client.get_run(run_id).info.lifecycle_stage == "active":
                    client.delete_run(run_id)
    except HeliostatError as error:
        return f"; MLflow keeps its run {run_ids[folder.name]}: {error}"
    return f", in MLflow too ({run_ids[folder.name]})"
