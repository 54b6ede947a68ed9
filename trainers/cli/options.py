"""Arguments that several verbs of this room share. Imports nothing heavy."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.jobs.job import Submission

SPEC_HELP = "a file, a shipped spec's name, or module:Class"
UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def as_job(args: argparse.Namespace, command: tuple[str, ...]) -> "Submission":
    """The job that `submit` sends for a verb with the spec of a run."""
    from trainers.cli.submission import plan_submission

    return plan_submission(args, command)


def parse_duration_s(text: str) -> float:
    """Parse a duration such as 90s, 30min, 2h or 1d."""
    unit = text.lstrip("0123456789.")
    try:
        return float(text.removesuffix(unit)) * UNITS_S[unit or "s"]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(
            f"must be a number of s, min, h or d (got {text!r})"
        ) from None


def parse_counts(text: str) -> list[int]:
    """Parse numbers of workers such as 1,2,4; sorted, each once."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of workers such as 1,2,4 (got {text!r})")
    return found
