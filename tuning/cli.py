"""The verbs of sweeps, and `main`, which composes the verbs of all packages."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """The command `heliostat`. Returns the exit code; 2 is a mistake of the user's.

    What the user can do something about is told in a line, everything else is a traceback.
    """
    from cluster.errors import HeliostatError
    from cluster.session import check_packages

    try:
        check_packages(Path.cwd())
        args = parser().parse_args(arguments)
        return int(args.command(args))
    except HeliostatError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    import trainers.cli

    top = argparse.ArgumentParser(
        prog="heliostat",
        description="Train PyTorch models on Ray clusters and sweep their hyperparameters, "
        "tracked in MLflow.",
    )
    top.add_argument("--version", action="version", version="heliostat 0.1.0")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    trainers.cli.add_verbs(verbs)
    return top
