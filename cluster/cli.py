"""The verbs of the cluster, and what all verbs share. Imports nothing heavy."""

import argparse
from pathlib import Path
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run_options() -> argparse.ArgumentParser:
    """The options of every verb that runs a spec on Ray, as a parent parser."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the spec, e.g. optimizer.lr=3e-4; may be repeated",
    )
    options.add_argument(
        "--address", help="Ray cluster to use; RAY_ADDRESS when not given, else this machine"
    )
    options.add_argument("--name", help="name of the run; made from the spec's when not given")
    options.add_argument(
        "--verbose", action="store_true", help="show everything that Ray and its workers print"
    )
    return options


def add_verbs(verbs: Subparsers) -> None:
    cluster = verbs.add_parser(
        "cluster",
        help="the files of clusters: render, check",
        description="Render and check the files from which clusters are started.",
    )
    add_file_verbs(cluster.add_subparsers(title="verbs", metavar="VERB", required=True))


def add_file_verbs(verbs: Subparsers) -> None:
    """What is done about the files of clusters, before there is one."""
    render = verbs.add_parser(
        "render",
        help="print the file for a provider",
        description="Print the file of a cluster for a provider, rendered from its spec.",
    )
    render.add_argument(
        "--provider", required=True, choices=("aws", "gcp", "azure", "local", "kuberay")
    )
    render.add_argument(
        "--spec", type=Path, metavar="FILE", help="the cluster's spec; the shipped one if not given"
    )
    render.add_argument(
        "--job", action="store_true", help="with kuberay: a RayJob instead of a RayCluster"
    )
    render.set_defaults(command=render_command)
    check = verbs.add_parser(
        "check",
        help="what is wrong with a file, before it costs anything",
        description="Tell in a line each what is wrong with FILE, and what the cluster would cost.",
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(command=check_command)


def render_command(args: argparse.Namespace) -> int:
    from cluster.errors import SpecError
    from cluster.render import render
    from cluster.spec import SHIPPED, read_cluster

    if args.job and args.provider != "kuberay":
        raise SpecError("--job: is for --provider kuberay; elsewhere use `heliostat submit`")
    print(render(read_cluster(args.spec or SHIPPED), args.provider, args.job), end="")
    return 0


def check_command(args: argparse.Namespace) -> int:
    from cluster.check import examine

    report = examine(args.file)
    for line in (*report.findings, *report.prices):
        print(line)
    return 2 if report.findings else 0
