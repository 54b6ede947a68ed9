"""The verbs of the cluster, and what all verbs share. Imports nothing heavy."""

import argparse
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run_options(named: bool = True) -> argparse.ArgumentParser:
    """The options of every verb that runs a spec on Ray, as a parent parser.

    `named` verbs make something that is kept by its name.
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
        "--address", help="Ray cluster to use; RAY_ADDRESS when not given, else this machine"
    )
    if named:
        options.add_argument("--name", help="name of the run; made from the spec's when not given")
    options.add_argument(
        "--verbose", action="store_true", help="show everything that Ray and its workers print"
    )
    return options
