"""The verbs of a running cluster: `up`, `down`, `status`, `attach`. Imports nothing heavy."""

import argparse
from pathlib import Path

from cluster.cli.jobs import Subparsers

CLUSTER_FILE = "a file for `ray up`, such as cluster.yaml"


def add_verbs(verbs: Subparsers) -> None:
    """`up`, `down`, `status` and `attach`: a cluster from its start to its end."""
    for verb, what, command in (
        ("up", "start a cluster and wait until all its minimum nodes are in", up_command),
        ("down", "end a cluster, and everything that runs on it", down_command),
        ("attach", "open a shell on a cluster's head", attach_command),
    ):
        parser = verbs.add_parser(verb, help=what, description=f"{what[0].upper()}{what[1:]}.")
        parser.add_argument("file", type=Path, help=CLUSTER_FILE)
        parser.set_defaults(command=command)
    status = verbs.add_parser(
        "status",
        help="show a cluster's nodes, what runs, and what it costs",
        description="Show a cluster's nodes and devices, what runs, and what it costs per hour.",
    )
    status.add_argument("file", type=Path, nargs="?", help=CLUSTER_FILE)
    status.add_argument(
        "--address",
        help="http:// address of a dashboard; RAY_ADDRESS, else this machine's when not given",
    )
    status.set_defaults(command=status_command)


def up_command(args: argparse.Namespace) -> int:
    from cluster.lifecycle import launcher

    launcher.up(args.file, print_line)
    return 0


def down_command(args: argparse.Namespace) -> int:
    from cluster.lifecycle import launcher

    launcher.down(args.file, print_line)
    return 0


def attach_command(args: argparse.Namespace) -> int:
    from cluster.lifecycle import launcher

    return launcher.attach(args.file)


def status_command(args: argparse.Namespace) -> int:
    from rich.console import Console

    from cluster.connection.job_server_client import dashboard_url
    from cluster.connection.ssh import tunnel
    from cluster.lifecycle.status import print_status

    console = Console(highlight=False, soft_wrap=True)
    if args.file:
        with tunnel(args.file) as urls:
            print_status(console, urls.dashboard)
        return 0
    print_status(console, dashboard_url(args.address))
    return 0


def open_cluster_ui(file: Path, mlflow_port: int) -> int:
    """Keep a tunnel to a cluster's pages open until Ctrl-C."""
    import signal

    from cluster.connection.ssh import tunnel

    with tunnel(file, mlflow_port=mlflow_port) as urls:
        print_line(
            f"Ray's dashboard: {urls.dashboard}  (it asks for the token in ~/.ray/auth_token)"
        )
        print_line(f"MLflow: {urls.mlflow}  (Ctrl-C ends both)")
        signal.pause()
    return 0


def print_line(line: str) -> None:
    print(line, flush=True)
