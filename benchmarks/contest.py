"""Shared code of the benchmarks: interleaved rounds, medians, intervals of ratios, one table.

Machines are noisy, and their speed changes by itself. So all contenders run once in each round and
are compared within the round; a number from another day or machine means nothing here.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

Contender = Callable[[], float]
"""Runs once and returns one measurement, such as seconds per step."""

_not_run: list[dict[str, str]] = []
"""Rows for contenders that could not run."""


def options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has: `--rounds`, and `--tiny`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help=f"{rounds}, with --tiny 1")
    parser.set_defaults(usual_rounds=rounds)
    parser.add_argument(
        "--tiny", action="store_true", help="one round of tiny sizes, to see that the code runs"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the number of rounds filled in."""
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.tiny else args.usual_rounds)
    return args


def installed(module: str, contender: str | None = None) -> bool:
    """Whether a peer's module is installed. If not, the results get a row that says so."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        leave_out(contender or module, f"{module} is not installed: pip install -e '.[peers]'")
    return found


def leave_out(contender: str, reason: str) -> None:
    """Add a row to the results for a contender that is not run, with the reason."""
    _not_run.append({"against": contender, "not_run": reason})


def as_json(benchmark: str, results: list[dict[str, Any]]) -> None:
    """Print the contenders that were not run, and the results as JSON in the last line."""
    for row in _not_run:
        print(f"{row['against']}: not run, {row['not_run']}")
    print(json.dumps({"benchmark": benchmark, "rows": [*results, *_not_run]}))


def compete(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Run every contender once per round, in another order in each round."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            measured[name].append(contenders[name]())
    return measured


class Turns:
    """A contender's side of `take_turns`: call `step_done` after each step."""

    ADDRESS = "BENCHMARK_TURNS"
    """Environment variable with the path of the socket of the benchmark."""

    def __init__(self, steps_per_turn: int) -> None:
        self._steps, self._per_turn = 0, steps_per_turn
        self._benchmark: Connection = Client(os.environ[self.ADDRESS])
        self._began = 0.0

    def step_done(self) -> None:
        """At the end of a turn, send the seconds per step and wait for the next turn."""
        self._steps += 1
        if self._steps % self._per_turn == 0:
            self._benchmark.send((time.perf_counter() - self._began) / self._per_turn)
            self._benchmark.recv()
            self._began = time.perf_counter()


def take_turns(
    contenders: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], turns: int, rounds: int
) -> dict[str, list[float]]:
    """Run contenders, each a command with its environment, in turns of some steps.

    In a round all live at the same time, and one at a time goes on, in another order each time: the
    speed of the machine changes less between two turns than between two runs. The measurement of a
    round is the median over its turns; the first one, with all starts, is not counted. A process
    keeps its luck with memory and caches, of up to 10 %, so that it takes several rounds.
    """
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, seconds in _one_round_of_turns(contenders, turns, number).items():
            measured[name].append(statistics.median(seconds))
    return measured


def _one_round_of_turns(
    contenders: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], turns: int, seed: int
) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        connections: dict[str, Connection] = {}
        for number, (name, (command, variables)) in enumerate(contenders.items()):
            listener = stack.enter_context(Listener(str(folder / str(number))))
            process = subprocess.Popen(
                command,
                env={**os.environ, **variables, Turns.ADDRESS: str(folder / str(number))},
                start_new_session=True,
            )
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
            connections[name] = listener.accept()
            connections[name].recv()
        order, draw = list(contenders), random.Random(seed)
        for _ in range(turns):
            draw.shuffle(order)
            for name in order:
                connections[name].send(None)
                measured[name].append(connections[name].recv())
    return measured


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """The median over rounds of ours / theirs, and its 95 % bootstrap interval."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(2000))
    return statistics.median(pairs), medians[50], medians[1949]


def rows(case: str, ours: str, measured: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """One row for each other contender: the ratio of ours to theirs."""
    result = []
    for name, values in measured.items():
        if name != ours:
            middle, low, high = ratio(measured[ours], values)
            figures = {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
            result.append({"case": case, "against": name, **figures})
    return result


def show(case: str, measured: Mapping[str, list[float]], unit: str, scale: float) -> None:
    """Print the medians of a case, the fastest contender first."""
    print(f"\n{case}")
    for name, values in sorted(measured.items(), key=lambda item: statistics.median(item[1])):
        middle = statistics.median(values) * scale
        spread = (min(values) * scale, max(values) * scale)
        print(f"  {name:<28} {middle:9.3f} {unit}   ({spread[0]:.3f} to {spread[1]:.3f})")


def finish(benchmark: str, results: list[dict[str, Any]]) -> None:
    """Print the ratios as a table, and everything as JSON in the last line."""
    print(f"\n{'case':<24} {'against':<28} {'ratio':>7}   95 % interval")
    for row in results:
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        print(f"{row['case']:<24} {row['against']:<28} {row['ratio']:>7.3f}   {interval}")
    as_json(benchmark, results)
