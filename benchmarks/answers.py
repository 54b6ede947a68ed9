"""Compares workloads with answers that are known without them; writes `docs/answers.md`.

`python benchmarks/answers.py [NAME ...] [--tiny]` takes some minutes per workload on two cores.
With `--tiny` it trains a few steps and does not change the page. The part of each workload is
`answer_NAME.py` beside this file: its `answer()` trains with the ordinary loop and returns its text
and tables for the page. One workload per core runs at a time, because small models gain little
from a second core.
"""

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.base.config import apply_overrides
from trainers.spec import find_spec

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "answers.md"
HEAD = """# Known answers

The results of the shipped workloads, compared with answers that are known without training them.
`make answers` writes this page. Each section is from one run, under the conditions that it names.
"""


TINY_VARIABLE = "HELIOSTAT_TINY_ANSWERS"
TINY = {
    "digits": ["train.epochs=0.1"],
    "dynamics": ["data.trajectories=1", "train.epochs=0.2"],
    "folding": ["data.train_parts=1", "train.epochs=0.05"],
    "hedging": ["data.train_parts=1", "train.epochs=0.2"],
    "language": [f"data.source={ROOT / 'docs' / 'decisions.md'}", "data.vocabulary=256"],
    "markets": ["data.train_parts=1", "train.epochs=0.01"],
}
"""Overrides of the shipped specs for `--tiny`."""


def is_tiny() -> bool:
    return TINY_VARIABLE in os.environ


def shipped_spec(name: str) -> dict[str, Any]:
    """The plain data of a shipped spec; with `--tiny`, for a few steps on little data."""
    return apply_overrides(find_spec(name)[1], TINY[name] if is_tiny() else [])


def commit() -> str:
    """The commit that is checked out, and whether its files have been changed."""
    asked = ("git", "describe", "--always", "--dirty=, changed", "--exclude=*")
    return subprocess.run(
        asked, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def conditions(at_once: int) -> str:
    """The conditions of this run: date, commit, versions, cores."""
    when = f"{time.strftime('%Y-%m-%d')}, commit {commit()}"
    where = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{when}, {where}, on one core, with {at_once} workloads at a time"


def section(name: str, body: str, seconds: float, under: str) -> str:
    """The section of a workload in the page."""
    ran = f"`python benchmarks/answers.py {name}`, {under}, {seconds:.0f} s."
    return f"## {name}\n{ran}\n\n{body}\n"


def replaced(page: str, name: str, text: str) -> str:
    """The page with a new section of a workload, in place of its old one or at the end."""
    head, *sections = page.split("\n## ")
    kept = {each.partition("\n")[0]: f"## {each.strip()}\n" for each in sections}
    kept[name] = text
    return "\n".join([head.strip() + "\n", *kept.values()])


def answered(name: str, under: str) -> str:
    """Train a workload in this process, and return its section of the page."""
    torch.set_num_threads(1)
    began = time.monotonic()
    body = importlib.import_module(f"answer_{name}").answer()
    return section(name, body, time.monotonic() - began, under)


def main() -> None:
    there = sorted(
        path.stem.removeprefix("answer_") for path in Path(__file__).parent.glob("answer_*.py")
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="a few steps; writes nothing")
    args = parser.parse_args()
    if args.tiny:
        os.environ[TINY_VARIABLE] = "1"
    names = args.names or there
    for name in names:
        if name not in there:
            sys.exit(f"no answers for {name!r}; there are: {', '.join(there)}")
    at_once = min(len(names), os.cpu_count() or 1)
    under = conditions(at_once)  # before the page is written, which is itself a change
    with concurrent.futures.ProcessPoolExecutor(
        at_once, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        asked = {pool.submit(answered, name, under): name for name in names}
        for done in concurrent.futures.as_completed(asked):
            print(done.result(), flush=True)
            if not args.tiny:
                page = PAGE.read_text() if PAGE.exists() else HEAD
                PAGE.write_text(replaced(page, asked[done], done.result()))
    print(json.dumps({"benchmark": "answers", "rows": [{"case": name} for name in names]}))


if __name__ == "__main__":
    main()
