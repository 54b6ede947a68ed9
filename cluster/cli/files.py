"""The verbs `cluster render` and `cluster check`, for the files from which clusters are started."""

import argparse
from pathlib import Path

from cluster.cli.options import Subparsers


def add_verbs(verbs: Subparsers) -> None:
    cluster = verbs.add_parser(
        "cluster",
        help="render and check the files of clusters",
        description="Render and check the files from which clusters are started.",
    )
    verbs = cluster.add_subparsers(title="verbs", metavar="VERB", required=True)
    render = verbs.add_parser(
        "render",
        help="print the file for a provider",
        description="Print the file of a cluster for a provider, rendered from its spec.",
    )
    render.add_argument(
        "--provider", required=True, choices=("aws", "gcp", "azure", "local", "kuberay")
    )
    render.add_argument(
        "--spec", type=Path, metavar="FILE", help="the cluster's spec (default: the shipped one)"
    )
    render.add_argument(
        "--job", action="store_true", help="with kuberay: a RayJob instead of a RayCluster"
    )
    render.set_defaults(command=render_command)
    check = verbs.add_parser(
        "check",
        help="find mistakes in a file before they cost anything",
        description="Print a line for each mistake in FILE, and the cost of the cluster.",
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(command=check_command)


def render_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import SpecError
    from cluster.definition.launcher_file import render
    from cluster.definition.spec import SHIPPED_SPEC, read_cluster_spec

    if args.job and args.provider != "kuberay":
        raise SpecError("--job: is for --provider kuberay; elsewhere use `heliostat submit`")
    print(render(read_cluster_spec(args.spec or SHIPPED_SPEC), args.provider, args.job), end="")
    return 0


def check_command(args: argparse.Namespace) -> int:
    from cluster.definition.check import check_file

    report = check_file(args.file)
    for line in (*report.findings, *report.prices):
        print(line)
    return 2 if report.findings else 0
