"""The step-time model: recovered terms, refused predictions, and errors on published traces.

The traces are those of Pollux (OSDI '21; the AdaptDL repository, branch osdi21-artifact,
Apache-2.0). The environment variable POLLUX_TRACES names their folder.
"""

import csv
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.planning.step_time import (
    Measurement,
    Placement,
    Prediction,
    StepTimeModel,
    Unknown,
    fit,
    knee,
)

TRACES = Path(os.environ.get("POLLUX_TRACES", Path(__file__).parents[4] / "shared/data/pollux"))


def predicted(model: StepTimeModel, place: Placement) -> Prediction:
    found = model.predict(place)
    assert isinstance(found, Prediction), found
    return found


def probes(model: StepTimeModel, *places: Placement) -> list[Measurement]:
    return [Measurement(place, model.step_s(place)) for place in places]


@settings(deadline=None)  # the first call imports scipy
@given(c=st.floats(1e-4, 1), a=st.floats(0, 1), b=st.floats(0, 1), each=st.floats(1e-6, 1e-2))
def test_terms_are_recovered_from_exact_probes(c: float, a: float, b: float, each: float) -> None:
    def step_s(workers: int, nodes: int, samples: float) -> float:
        exchange = a * (workers - 1) / workers if nodes == 1 else b * (nodes - 1) / nodes
        return c + each * samples + exchange

    points = [
        Measurement(Placement(*where), step_s(*where))
        for where in [(1, 1, 64), (1, 1, 32), (4, 1, 16), (8, 2, 8), (16, 4, 4)]
    ]
    model = fit(points)
    for where in [(2, 1, 32), (12, 3, 16), (24, 6, 16), (32, 8, 8)]:
        assert model.step_s(Placement(*where)) == pytest.approx(step_s(*where), rel=1e-3)


def test_measured_placements_are_returned_and_kinds_without_a_probe_are_unknown() -> None:
    one = [Measurement(Placement(1, 1, 64), 1.0), Measurement(Placement(1, 1, 32), 0.6)]
    alone = fit(one)
    assert predicted(alone, Placement(1, 1, 64)).step_s == 1.0
    assert str(predicted(alone, Placement(1, 1, 64)).basis) == "measured"
    assert alone.predict(Placement(2, 1, 32)) == Unknown(
        "no two workers of one node were probed together"
    )
    node = fit([*one, Measurement(Placement(2, 1, 32), 0.7)])
    assert str(predicted(node, Placement(4, 1, 16)).basis) == "extrapolated x 2"
    assert node.predict(Placement(8, 2, 8)) == Unknown("no two nodes were probed together")
    assert node.predict(Placement(16, 1, 4)) == Unknown("8 times more than was probed")
    nodes = fit(
        [*one, Measurement(Placement(2, 1, 32), 0.7), Measurement(Placement(4, 2, 32), 0.9)]
    )
    assert str(predicted(nodes, Placement(6, 3, 32)).basis) == "extrapolated x 1.5"


def test_errors_grow_with_the_distance_from_the_probes() -> None:
    def errors(*counts: int) -> list[float]:
        probed = [Measurement(Placement(2 * n, n, 8), 0.4) for n in counts]
        model = fit(
            [Measurement(Placement(1, 1, 8), 0.3), Measurement(Placement(2, 1, 8), 0.3), *probed]
        )
        return [predicted(model, Placement(2 * n, n, 8)).error for n in (4, 3, 6, 8, 12, 16)]

    two = errors(2, 4)
    assert two == sorted(set(two))
    one = fit(
        [
            Measurement(Placement(1, 1, 8), 0.3),
            Measurement(Placement(4, 2, 8), 0.4),
            Measurement(Placement(1, 1, 4), 0.2),
        ]
    )
    assert (
        predicted(one, Placement(6, 3, 8)).error > two[-1]
    )  # how it grows with nodes is not known
    known = errors(2, 4)[1]
    model = fit([Measurement(Placement(2 * n, n, 8), 0.4) for n in (1, 2, 4)])
    assert predicted(model, Placement(6, 3, 2)).error > known  # a smaller share than any probed


@settings(deadline=None)  # the first call imports scipy
@given(
    st.floats(1e-4, 1),
    st.floats(1e-5, 1),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([16, 64, 256]),
)
def test_no_node_is_predicted_to_do_more_than_its_cores(
    fixed: float, each: float, cores: int, batch: int
) -> None:
    """Probed with one and two workers, each with the work of one thread: perfect scaling."""
    places = [
        Placement(workers, 1, batch / workers / part, cores)
        for workers in (1, 2)
        for part in (1, 2)
    ]
    points = [Measurement(place, fixed + each * place.samples) for place in places]
    model = fit(points)
    full = batch / model.step_s(Placement(cores, 1, batch / cores, cores))
    for workers in (2 * cores, 4 * cores, 16 * cores):
        assert batch / model.step_s(Placement(workers, 1, batch / workers, cores)) <= full * 1.001


def test_the_knee_is_the_last_worker_that_adds_half_of_a_single_one() -> None:
    assert knee({1: 100.0}) == 1
    assert knee({1: 100.0, 2: 195.0, 4: 380.0, 8: 700.0}) == 8
    assert knee({1: 100.0, 2: 190.0, 4: 300.0, 8: 340.0}) == 4
    assert knee({1: 100.0, 2: 90.0, 4: 80.0}) == 1


def traces() -> dict[tuple[str, int], dict[tuple[int, int], float]]:
    """(Network, samples per device) -> {(devices, nodes): step time}; several nodes are full."""
    found: dict[tuple[str, int], dict[tuple[int, int], float]] = defaultdict(dict)
    for path in sorted(TRACES.glob("*-placements.csv")):
        model = path.name.partition("-")[0]
        for row in csv.DictReader(path.open()):
            devices = [int(each) for each in row["placement"]]
            if len(devices) == 1 or set(devices) == {4}:
                place = sum(devices), len(devices)
                found[model, int(row["local_bsz"])][place] = float(row["step_time"])
        for row in csv.DictReader((TRACES / f"{model}-scalability.csv").open()):
            nodes, devices_of_all = int(row["num_nodes"]), int(row["num_replicas"])
            if devices_of_all == 4 * nodes:
                place = devices_of_all, nodes
                found[model, int(row["local_bsz"])][place] = float(row["step_time"])
    return found


NODE = [(1, 1), (2, 1), (4, 1)]
FAR = [(24, 6), (32, 8), (48, 12), (64, 16)]
GROWTH_KNOWN = [
    [*NODE, (8, 2), (16, 4)],
    [*NODE, (8, 2), (12, 3)],
    [*NODE, (8, 2), (24, 6)],
    [*NODE, (12, 3), (24, 6)],
    [*NODE, (8, 2), (16, 4), (32, 8)],
]
GROWTH_UNKNOWN = [[*NODE, (8, 2)], [*NODE, (12, 3)], [*NODE, (16, 4)], [(1, 1), (2, 1)]]
REGIMES = {"known": GROWTH_KNOWN, "unknown": GROWTH_UNKNOWN}
MARGIN = 1.5
"""How much more a model that was not looked at may need than any that was."""
Steps = dict[tuple[int, int], float]
needs_traces = pytest.mark.skipif(
    not TRACES.is_dir(), reason=f"Pollux's traces are not in {TRACES}"
)


def shares_of_bars(
    step_s: Steps, samples: int, probed: list[tuple[int, int]], min_nodes: int = 1
) -> list[float]:
    """The error of each prediction from probes of `probed`, as a share of the shipped error."""
    if not step_s.keys() >= set(probed):
        return []
    model = fit([Measurement(Placement(*each, samples), step_s[each]) for each in probed])
    found = []
    for place in step_s.keys() - set(probed):
        prediction = model.predict(Placement(*place, samples))
        if isinstance(prediction, Prediction) and place[1] >= min_nodes:
            ratio = prediction.step_s / step_s[place]
            found.append((max(ratio, 1 / ratio) - 1) / prediction.error)
    return found


@needs_traces
@pytest.mark.parametrize(
    ("probed", "median", "p90"),
    [
        pytest.param([*NODE, (8, 2)], 0.16, 0.35, id="one number of nodes"),
        pytest.param([*NODE, (8, 2), (16, 4)], 0.14, 0.34, id="two numbers of nodes"),
    ],
)
def test_published_traces(probed: list[tuple[int, int]], median: float, p90: float) -> None:
    """Steps at 6 to 16 full nodes, from probes on 1 to 4: four models, each batch size alone.

    Measured: 12.0 % (p90 34 %) with one number of nodes probed, 12.2 % (25 %) with two; the six
    models of the paper give 16 % (33 %) and 13 to 14 % (26 to 34 %).
    """
    errors = []
    for (_, samples), step_s in traces().items():
        if step_s.keys() >= set(probed):
            model = fit([Measurement(Placement(*each, samples), step_s[each]) for each in probed])
            errors += [
                abs(model.step_s(Placement(*each, samples)) / step_s[each] - 1)
                for each in FAR
                if each in step_s
            ]
    assert len(errors) == 94
    assert float(np.median(errors)) <= median
    assert float(np.quantile(errors, 0.9)) <= p90


@needs_traces
@pytest.mark.parametrize("regime", REGIMES)
def test_intervals_hold_for_a_published_model_that_was_left_out(regime: str) -> None:
    """The shipped errors, set by the other models alone, hold 9 of 10 predictions of each model.

    They are at least `MARGIN` times what the other models need, and that is enough for each.
    """
    needed = {}
    for network in sorted({network for network, _ in traces()}):
        shares = [
            share
            for (name, samples), step_s in traces().items()
            if name == network
            for probed in REGIMES[regime]
            for share in shares_of_bars(step_s, samples, probed)
        ]
        assert len(shares) >= 60
        needed[network] = float(np.quantile(shares, 0.9))
    assert len(needed) == 4
    for left_out, need in needed.items():
        others = max(each for network, each in needed.items() if network != left_out)
        assert need <= MARGIN * others, (left_out, needed)
        assert MARGIN * others <= 1, (left_out, needed)


def simulated_model(random: np.random.Generator) -> Steps:
    """Step times of a model of a few milliseconds whose exchange is bound by latency.

    Each message around a ring takes its latency, and each round as long as its slowest message. So
    many buckets of gradients as the model has are sent one after the other. Nothing here knows of
    the terms that are fitted.
    """
    compute_s = random.uniform(2e-3, 12e-3)
    buckets, size_bytes = int(random.integers(1, 6)), 10 ** random.uniform(5, 7.7)
    links = {
        "node": (10 ** random.uniform(-5.5, -4.5), 1e10),
        "network": (10 ** random.uniform(-4.5, -3.3), 10 ** random.uniform(8.7, 10)),
    }
    found = {}
    for workers, nodes in [*NODE, (3, 1), *((4 * n, n) for n in (2, 3, 4, 6, 8, 12, 16))]:
        exchange_s = np.zeros(20)
        for members, link in ((workers // nodes, "node"), (nodes, "network")):
            latency_s, bytes_per_s = links[link]
            rounds = 2 * (members - 1) * buckets
            late = 1 + random.exponential(0.3, (20, rounds, members)).max(axis=2)
            exchange_s += latency_s * late.sum(axis=1)
            exchange_s += 2 * (members - 1) / members * size_bytes / bytes_per_s
        slowest = random.lognormal(0, 0.05, (20, workers)).max(axis=1)
        step_s = compute_s * slowest + exchange_s * random.lognormal(0, 0.1)
        found[workers, nodes] = float(step_s.mean())
    return found


@pytest.mark.parametrize("regime", REGIMES)
def test_intervals_hold_for_simulated_models_that_are_bound_by_latency(regime: str) -> None:
    random = np.random.default_rng(1)
    models = [simulated_model(random) for _ in range(60)]
    assert np.median([step_s[1, 1] for step_s in models]) < 0.01
    assert np.median([1 - step_s[1, 1] / step_s[32, 8] for step_s in models]) > 0.6
    shares = [
        share
        for step_s in models
        for probed in REGIMES[regime]
        for share in shares_of_bars(step_s, 8, probed, min_nodes=2)
    ]
    assert np.mean([share <= 1 for share in shares]) >= 0.9


@needs_traces
def test_intervals_of_long_steps_stay_narrow() -> None:
    """ImageNet's, of half a second, at up to twice the nodes that were probed."""
    errors = []
    for (network, samples), step_s in traces().items():
        probed = [*NODE, (8, 2), (16, 4)]
        if network == "imagenet" and step_s.keys() >= set(probed):
            model = fit([Measurement(Placement(*each, samples), step_s[each]) for each in probed])
            errors += [predicted(model, Placement(*e, samples)).error for e in [(12, 3), (32, 8)]]
    assert len(errors) >= 10
    assert np.median(errors) <= 0.35
