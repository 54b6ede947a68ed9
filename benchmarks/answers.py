"""Workloads against answers that are known beforehand: writes the tables of `docs/answers.md`.

`python benchmarks/answers.py [NAME ...] [--tiny]` takes some minutes per workload on two cores;
with `--tiny` it trains a few steps and leaves the document alone. Each
workload's own part is `answer_NAME.py` beside this file: its `answer()` trains with the ordinary
loop and returns the rows of a table, in the document's own words. As many as there are cores are
at work at once, on one core each: small models gain little from a second one.
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

What the shipped workloads learn, against what is known without them. `make answers` writes this
page; each table is of one run on the machine that it names.
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
    """The plain data of a shipped spec; with `--tiny`, of a few steps on little data."""
    return apply_overrides(find_spec(name)[1], TINY[name] if is_tiny() else [])


def commit() -> str:
    """What is checked out, and whether it has been changed."""
    asked = ("git", "describe", "--always", "--dirty=, changed", "--exclude=*")
    return subprocess.run(
        asked, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def table(rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def conditions(at_once: int) -> str:
    """Under which all that is asked for now is measured."""
    when = f"{time.strftime('%Y-%m-%d')}, commit {commit()}"
    where = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{when}, {where}, on one core, {at_once} such at once"


def section(name: str, body: str, seconds: float, under: str) -> str:
    """A workload's part of the page."""
    ran = f"`python benchmarks/answers.py {name}`, {under}, {seconds:.0f} s."
    return f"## {name}\n{ran}\n\n{body}\n"


def replaced(page: str, name: str, text: str) -> str:
    """The page with a workload's section in place of the one it had, or at the end."""
    head, *sections = page.split("\n## ")
    kept = {each.partition("\n")[0]: f"## {each.strip()}\n" for each in sections}
    kept[name] = text
    return "\n".join([head.strip() + "\n", *kept.values()])


def answered(name: str, under: str) -> str:
    """A workload's part of the page, by a process of its own."""
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
    under = conditions(at_once)  # now: the page that is written below is itself a change
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
