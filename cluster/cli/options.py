"""Options that several verbs share, as parent parsers of argparse."""

import argparse
from pathlib import Path
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run_options(named: bool = True) -> argparse.ArgumentParser:
    """The options of every verb that runs a spec on Ray.

    `named` is for verbs that store a run under a name.
    """
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the spec, e.g. optimizer.lr=3e-4; may be repeated",
    )
    options.add_argument(
        "--address", help="Ray cluster to use (default: RAY_ADDRESS, else this machine)"
    )
    if named:
        options.add_argument(
            "--name", help="name of the run (default: the spec's name and a unique ending)"
        )
    options.add_argument(
        "--or-resume",
        action="store_true",
        # A job whose driver was lost is started again with this flag, whatever its verb.
        help="resume the run of that --name if there is one, instead of refusing the name"
        if named
        else argparse.SUPPRESS,
    )
    options.add_argument(
        "--verbose", action="store_true", help="show everything that Ray and its workers print"
    )
    return options


def cluster_options() -> argparse.ArgumentParser:
    """The options of every verb that asks a running cluster."""
    options = argparse.ArgumentParser(add_help=False)
    target = options.add_mutually_exclusive_group()
    target.add_argument(
        "--cluster", type=Path, metavar="FILE", help="cluster.yaml; the cluster is reached by SSH"
    )
    target.add_argument(
        "--address",
        metavar="URL",
        help="the dashboard's URL (default: RAY_ADDRESS, else http://127.0.0.1:8265)",
    )
    return options
