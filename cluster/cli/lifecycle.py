"""The verbs of a running cluster: `up`, `down`, `status`, `attach`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers

if TYPE_CHECKING:
    from rich.console import Console

CLUSTER_FILE = "a file for `ray up`, such as cluster.yaml"


def add_verbs(verbs: Subparsers) -> None:
    for verb, description, command in (
        ("up", "start a cluster and wait until its minimum nodes have joined", up_command),
        ("down", "end a cluster and everything that runs on it", down_command),
        ("attach", "open a shell on a cluster's head", attach_command),
    ):
        sentence = f"{description[0].upper()}{description[1:]}."
        parser = verbs.add_parser(verb, help=description, description=sentence)
        parser.add_argument("file", type=Path, help=CLUSTER_FILE)
        parser.set_defaults(command=command)
    status = verbs.add_parser(
        "status",
        help="show a cluster's nodes, jobs and cost",
        description="Show a cluster's nodes and devices, its jobs, and its cost per hour.",
    )
    status.add_argument("file", type=Path, nargs="?", help=CLUSTER_FILE)
    status.add_argument(
        "--address", help="the dashboard's http:// URL (default: RAY_ADDRESS, else this machine's)"
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

    console = Console(highlight=False, soft_wrap=True)
    if args.file:
        with tunnel(args.file) as urls:
            print_status(console, urls.dashboard)
        return 0
    print_status(console, dashboard_url(args.address))
    return 0


def print_status(console: "Console", dashboard: str) -> None:
    """Print nodes, jobs and cost."""
    from rich.table import Table

    from cluster.lifecycle.status import cost_line, list_nodes, list_running_jobs

    nodes, jobs = list_nodes(dashboard), list_running_jobs(dashboard)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("node", "type", "CPUs", "devices", "memory", "$/h"):
        table.add_column(title)
    for node in nodes:
        table.add_row(
            node.address,
            node.node_type,
            f"{node.resources.get('CPU', 0):g}",
            node.devices(),
            f"{node.resources.get('memory', 0) / 2**30:.1f} GiB",
            "unknown" if node.usd_per_hour is None else f"{node.usd_per_hour:.3f}",
        )
    console.print(f"{len(nodes)} nodes")
    console.print(table)
    for line in jobs or ["no job is running"]:
        console.print(line, markup=False)
    console.print(cost_line(nodes))


def open_cluster_ui(file: Path, mlflow_port: int) -> int:
    """Keep a tunnel to a cluster's web pages open until Ctrl-C."""
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
