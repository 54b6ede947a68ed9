"""The verb `ui`: MLflow's pages."""

import argparse
from pathlib import Path

from cluster.cli.lifecycle import open_cluster_ui
from cluster.cli.options import Subparsers


def add_verbs(verbs: Subparsers) -> None:
    ui = verbs.add_parser("ui", help="open MLflow's pages on this folder's runs, or a cluster's")
    ui.add_argument(
        "--cluster", type=Path, metavar="FILE", help="open Ray's and MLflow's pages of its head"
    )
    ui.add_argument("--uri", help="MLflow tracking URI; MLFLOW_TRACKING_URI, else ./mlflow.db")
    ui.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default 5000)")
    ui.set_defaults(command=ui_command)


def ui_command(args: argparse.Namespace) -> int:  # noqa: RET503
    import os
    import sys

    from trainers.tracking.mlflow_store import create_database
    from trainers.tracking.preflight import moved_roots
    from trainers.tracking.tracker import default_tracking_uri

    if args.cluster:
        return open_cluster_ui(args.cluster, args.port)
    uri = args.uri or default_tracking_uri()
    if uri.startswith(("http://", "https://")):
        print(f"MLflow's pages are at {uri}")
        return 0
    create_database(uri)
    if moved_roots(uri):
        print(f"artifacts of earlier runs were moved; heliostat track relocate --uri {uri}")
    print(f"MLflow on {uri}: http://127.0.0.1:{args.port}  (Ctrl-C ends it)", flush=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    server = ["mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command = [sys.executable, "-m", *server, "--port", str(args.port), "--workers", "1"]
    os.execv(sys.executable, command)  # signals to this process are then signals to the server
