"""How good the values are that a search finds, over its trials and over its trial-seconds.

    python benchmarks/search.py [--rounds 10] [--surface branin digits-mlp] [--only heliostat ray]
    python benchmarks/search.py --tiny       # a few trials of everything, to try the code

| contender | what it is |
|---|---|
| `heliostat` | the section `sweep` of a spec with `search: auto` and asha, as by default |
| `heliostat-curves` | the same with the scheduler `extrapolation` on learning curves |
| `heliostat-tpe` | the first with `search: tpe` |
| `optuna` | Optuna alone: TPE, and on learning curves its own default, the median pruner |
| `ray` | Ray Tune: OptunaSearch, and on learning curves its ASHA, with our grace and reduction |
| `syne-tune` | Syne Tune 0.16: CQR, and on learning curves ASHACQR |
| `random` | uniform in the space; nothing is stopped early |

Nothing is trained while the contenders search: the surfaces are in `search_surfaces.py`, where the
two real ones are tables of learning curves that were trained once, and are replayed. That makes ten
seeds cheap, and all contenders meet the same curves. One loop in simulated time runs all of them:
four trials at a time, each reports when its seconds have passed, and the next one starts when one
has ended. Searchers and schedulers are called as Ray Tune 2.60 calls them. The simulated time
has no place for the searchers' own time, which is shown in a table of its own.

A search ends when its trials have cost as many trial-seconds as `Surface.trials` whole trials. Two
figures are compared, seed by seed: the excess of the best loss over the surface's lowest one, and
the trial-seconds until the loss is as low as the median of `ray` at its end. A search that never
gets there counts with all of its trial-seconds.
"""

import argparse
import heapq
import json
import logging
import math
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
try:
    import optuna
    from contest import as_json, leave_out, options, parse, ratio
    from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
    from ray.tune.search.optuna import OptunaSearch
    from search_surfaces import (
        EVALUATIONS,
        REAL,
        Surface,
        Values,
        known_surfaces,
        real_surfaces,
    )

    from cluster.base.files import cache_folder
    from tuning.search.schedulers import build_scheduler
    from tuning.search.searcher import JournaledSearcher
    from tuning.spaces.space import SweepSpec
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks/search.py: needs {error.name}, which is not installed here")

AT_A_TIME = 4
REDUCTION = 3
"""Of the trials at a rung, ASHA continues one of so many."""
METRIC = "val/loss"
SYNE_TUNE = ("syne-tune==0.16.*", "huggingface_hub")
"""Without its extras: they bring a PyTorch of their own, and CQR needs none."""


class Contender(Protocol):
    """One search."""

    def suggest(self, number: int) -> Values | None:
        """The parameters of trial `number`; None if there are no more."""

    def report(self, number: int, epoch: int, loss: float) -> bool:
        """Whether the trial is to be stopped."""

    def end(self, number: int, epoch: int, loss: float, complete: bool) -> None: ...


Start = Callable[[Surface, int, int], Contender]
"""From the surface, the evaluations of a trial and the seed, a new search."""


class Random:
    def __init__(self, surface: Surface, evaluations: int, seed: int) -> None:
        self._space, self._draw = surface.space, random.Random(seed)

    def suggest(self, number: int) -> Values:
        return {name: self._value(**distribution) for name, distribution in self._space.items()}

    def _value(self, **distribution: Any) -> Any:
        ((kind, values),) = distribution.items()
        if kind == "choice":
            return self._draw.choice(values)
        if kind == "integer":
            return self._draw.randint(*values)
        if kind == "loguniform":
            return math.exp(self._draw.uniform(*map(math.log, values)))
        return self._draw.uniform(*values)

    def report(self, number: int, epoch: int, loss: float) -> bool:
        return False

    def end(self, number: int, epoch: int, loss: float, complete: bool) -> None:
        pass


def optuna_space(surface: Surface) -> dict[str, Any]:
    made = optuna.distributions
    kinds = {
        "uniform": made.FloatDistribution,
        "loguniform": lambda low, high: made.FloatDistribution(low, high, log=True),
        "integer": made.IntDistribution,
        "choice": lambda *values: made.CategoricalDistribution(values),
    }
    return {
        name: kinds[kind](*values)
        for name, distribution in surface.space.items()
        for kind, values in distribution.items()
    }


class Optuna:
    """A study as a user has it: the default pruner is the median."""

    def __init__(self, surface: Surface, evaluations: int, seed: int) -> None:
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # trials at a time
        self._study = optuna.create_study(sampler=sampler)
        self._space = optuna_space(surface)
        self._trials: dict[int, optuna.Trial] = {}

    def suggest(self, number: int) -> Values:
        self._trials[number] = self._study.ask(self._space)
        return self._trials[number].params

    def report(self, number: int, epoch: int, loss: float) -> bool:
        self._trials[number].report(loss, epoch)
        return self._trials[number].should_prune()

    def end(self, number: int, epoch: int, loss: float, complete: bool) -> None:
        if complete:
            self._study.tell(self._trials[number], loss)
        else:
            self._study.tell(self._trials[number], state=optuna.trial.TrialState.PRUNED)


class Tune:
    """A searcher and a scheduler of Ray Tune, called in the order of its controller."""

    def __init__(self, searcher: Any, scheduler: Any) -> None:
        self._searcher, self._scheduler = searcher, scheduler
        scheduler.set_search_properties(METRIC, "min")
        self._trials: dict[int, Any] = {}
        self._controller = SimpleNamespace(
            search_alg=None, get_trials=lambda: [*self._trials.values()]
        )

    def suggest(self, number: int) -> Values | None:
        config = self._searcher.suggest(f"t{number}")
        if not isinstance(config, dict):
            return None
        trial = SimpleNamespace(
            trial_id=f"t{number}", config=config, last_result={}, status="RUNNING"
        )
        trial.is_finished = lambda: trial.status == "TERMINATED"
        self._trials[number] = trial
        self._scheduler.on_trial_add(self._controller, trial)
        return config

    def _result(self, number: int, epoch: int, loss: float, complete: bool) -> dict[str, Any]:
        counts = {"epoch": float(epoch), "step": epoch, "training_iteration": epoch}
        return {METRIC: loss, "complete": complete, "trial_id": f"t{number}", **counts}

    def report(self, number: int, epoch: int, loss: float) -> bool:
        trial, result = self._trials[number], self._result(number, epoch, loss, False)
        stop = bool(self._scheduler.on_trial_result(self._controller, trial, result) == "STOP")
        trial.last_result = result
        if not stop:
            self._searcher.on_trial_result(trial.trial_id, result)
        return stop

    def end(self, number: int, epoch: int, loss: float, complete: bool) -> None:
        trial, result = self._trials[number], self._result(number, epoch, loss, complete)
        trial.last_result, trial.status = result, "TERMINATED"
        self._scheduler.on_trial_complete(self._controller, trial, result)
        self._searcher.on_trial_complete(trial.trial_id, result)


def ray(surface: Surface, evaluations: int, seed: int) -> Contender:
    searcher = OptunaSearch(optuna_space(surface), metric=METRIC, mode="min", seed=seed)
    if evaluations == 1:
        return Tune(searcher, FIFOScheduler())
    asha = AsyncHyperBandScheduler("epoch", max_t=evaluations, reduction_factor=REDUCTION)
    return Tune(searcher, asha)


class Heliostat(Tune):
    """A sweep's searcher and scheduler; `fields` are those of the section `sweep`."""

    def __init__(
        self, surface: Surface, evaluations: int, seed: int, stopping: str = "asha", **fields: Any
    ) -> None:
        stops = {"name": stopping, "reduction": REDUCTION}
        # On learning curves more trials than asha needs: the search ends when its time is spent.
        section = {
            "parameters": surface.space,
            "metric": METRIC,
            "scheduler": {"name": "none"} if evaluations == 1 else stops,
            "trials": surface.trials if evaluations == 1 else surface.trials * evaluations // 2,
            "seed": seed,
            **fields,
        }
        sweep = SweepSpec.model_validate(section)
        self._folder = tempfile.TemporaryDirectory()
        searcher = JournaledSearcher(sweep, Path(self._folder.name) / "journal.jsonl")
        super().__init__(searcher, build_scheduler(sweep, float(evaluations)))


class SyneTune:
    """The process of `search_syne_tune.py`, which serves one search after the other."""

    _process: "subprocess.Popen[str] | None" = None

    def __init__(self, surface: Surface, evaluations: int, seed: int) -> None:
        if SyneTune._process is None:
            SyneTune._process = subprocess.Popen(
                [str(syne_tune_python()), str(HERE / "search_syne_tune.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._ask(space=surface.space, epochs=evaluations, seed=seed)

    def _ask(self, **request: Any) -> Any:
        process = SyneTune._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def suggest(self, number: int) -> Values:
        values: Values = self._ask(ask=number)
        return values

    def report(self, number: int, epoch: int, loss: float) -> bool:
        return bool(self._ask(trial=number, epoch=epoch, loss=loss))

    def end(self, number: int, epoch: int, loss: float, complete: bool) -> None:
        if complete:  # it knows of those that it has stopped
            self._ask(ended=number, epoch=epoch, loss=loss)


def syne_tune_python() -> Path:
    """The Python of Syne Tune's own environment."""
    return cache_folder() / "benchmarks" / "syne-tune" / "bin" / "python"


def has_syne_tune(install: bool) -> bool:
    """Whether Syne Tune's environment is there, after making it if `install`."""
    python = syne_tune_python()
    works = [str(python), "-c", "import syne_tune.optimizer.baselines"]
    if install and not python.exists():
        venv.create(python.parents[1], with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *SYNE_TUNE], check=False)
    found = python.exists() and subprocess.run(works, capture_output=True).returncode == 0
    if not found:
        leave_out("syne-tune", f"pip install {shlex.join(SYNE_TUNE)} into {python.parents[1]}")
    return found


CONTENDERS: dict[str, Start] = {
    "heliostat": lambda *search: Heliostat(*search, search="auto"),
    "heliostat-curves": lambda *search: Heliostat(*search, search="auto", stopping="extrapolation"),
    "heliostat-tpe": lambda *search: Heliostat(*search, search="tpe"),
    "optuna": Optuna,
    "ray": ray,
    "syne-tune": SyneTune,
    "random": Random,
}


@dataclass
class Search:
    """How a search went."""

    spent: list[float] = field(default_factory=list)
    """Trial-seconds at each evaluation, of all trials together."""
    best: list[float] = field(default_factory=list)
    """The lowest loss until then."""
    trials: int = 0
    own_s: float = 0.0
    """CPU seconds of this process, and waiting for Syne Tune, that suggestions and reports took."""

    def spent_until(self, loss: float) -> float:
        reached = (spent for spent, best in zip(self.spent, self.best, strict=True) if best <= loss)
        return next(reached, self.spent[-1])


def run(start: Start, surface: Surface, evaluations: int, trials: int, seed: int) -> Search:
    """Search until the trials have cost as much as `trials` whole ones of average cost."""
    middle = Random(surface, evaluations, 0)
    costs = [surface.curve(middle.suggest(number))[1] for number in range(200)]
    limit = trials * evaluations * statistics.mean(costs)
    begin_s = time.perf_counter()
    contender, search = start(surface, evaluations, seed), Search()
    running: list[tuple[float, int, int]] = []
    curves: dict[int, tuple[list[float], float]] = {}
    lowest, spent = math.inf, 0.0

    def begin(now: float) -> None:
        values = contender.suggest(search.trials)
        if values is not None:
            curves[search.trials] = surface.curve(values)
            heapq.heappush(running, (now + curves[search.trials][1], search.trials, 1))
            search.trials += 1

    for _ in range(AT_A_TIME):
        begin(0.0)
    while running and spent < limit:
        now, number, epoch = heapq.heappop(running)
        losses, seconds = curves[number]
        loss = losses[epoch - 1]
        spent, lowest = spent + seconds, min(lowest, loss)
        search.spent.append(spent)
        search.best.append(lowest)
        stop = evaluations > 1 and contender.report(number, epoch, loss)
        if stop or epoch == evaluations:
            contender.end(number, epoch, loss, complete=epoch == evaluations)
            begin(now)
        else:
            heapq.heappush(running, (now + seconds, number, epoch + 1))
    search.own_s = time.perf_counter() - begin_s
    return search


def median_of(values: list[float]) -> str:
    """The median and its 95 % bootstrap interval."""
    middle, low, high = ratio(values, [1.0] * len(values))
    return f"{middle:10.4g} ({low:.4g} to {high:.4g})"


def show(name: str, surface: Surface, searches: dict[str, list[Search]]) -> list[dict[str, Any]]:
    """Print a surface's tables; a row for each figure and other contender, ours by theirs."""
    excess = {
        contender: [max(each.best[-1] - surface.minimum, 1e-9) for each in found]
        for contender, found in searches.items()
    }
    reference = "ray" if "ray" in searches else next(iter(searches))
    target = statistics.median(each.best[-1] for each in searches[reference])
    needed = {
        contender: [each.spent_until(target) for each in found]
        for contender, found in searches.items()
    }
    print(f"\n{name}: excess of the best loss, trial-seconds until {target:.4g}, trials, own s")
    for contender, found in searches.items():
        trials = statistics.median(each.trials for each in found)
        own = statistics.median(each.own_s for each in found)
        print(
            f"  {contender:<14} {median_of(excess[contender]):<36} "
            f"{median_of(needed[contender]):<36} {trials:6.0f} {own:7.2f}",
            flush=True,
        )
    result = []
    ours = next((contender for contender in searches if contender.startswith("heliostat")), None)
    for figure, values in (("excess", excess), ("trial-seconds", needed)):
        for contender in values:
            if ours and contender != ours:
                middle, low, high = ratio(values[ours], values[contender])
                row = {"case": f"{name}: {figure}", "against": contender}
                result.append({**row, "ratio": middle, "low": low, "high": high})
    return result


def compare(args: argparse.Namespace, names: list[str]) -> None:
    if "syne-tune" in names and not has_syne_tune(install=not args.tiny):
        names.remove("syne-tune")
    known = known_surfaces()
    wanted = args.surface or [*known, *REAL]
    surfaces = known | real_surfaces([name for name in wanted if name in REAL], args.tiny)
    results = []
    for name in wanted:
        surface = surfaces[name]
        evaluations = 1 if name in known else (3 if args.tiny else EVALUATIONS)
        trials = 6 if args.tiny else surface.trials
        searches: dict[str, list[Search]] = defaultdict(list)
        for seed in range(args.rounds):
            for contender in names:
                found = run(CONTENDERS[contender], surface, evaluations, trials, seed)
                searches[contender].append(found)
        results += show(name, surface, searches)
    print(f"\n{'case':<28} {'against':<16} {'ratio':>9}   95 % interval")
    for row in results:
        interval = f"{row['low']:.3g} to {row['high']:.3g}"
        print(f"{row['case']:<28} {row['against']:<16} {row['ratio']:>9.3g}   {interval}")
    as_json("search", results)


def main() -> None:
    parser = options(__doc__, rounds=10)
    parser.add_argument(
        "--surface", nargs="+", choices=[*known_surfaces(), *REAL], help="only these"
    )
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS], help="only these contenders")
    args = parse(parser)
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.disable(logging.WARNING)
    (cache_folder() / "benchmarks").mkdir(exist_ok=True)
    names = args.only or [*CONTENDERS]
    compare(args, names)


if __name__ == "__main__":
    main()
