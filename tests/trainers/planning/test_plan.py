"""Plans from recorded probes: options, marks, notes, and forecasts that stay unknown.

The probes are round numbers, not measurements.
"""

from collections.abc import Iterable

import pytest

from cluster.cost.catalog import instances
from cluster.cost.machine_filters import select_machines
from cluster.cost.node_rates import CostSpec
from trainers.planning.forecast import Forecast, RunLength
from trainers.planning.plan import Option, Plan, PlanRequest, cpu_advice, knee_of, plan
from trainers.planning.pools import Pool, ProbedPool, ProbeResult, find_pools, probed_pool
from trainers.planning.step_time import Placement, Unknown
from trainers.spec import RunSpec, find_spec, resolve

RUN = PlanRequest(RunLength(steps=10_001, evaluations=10, tests=1, saves=2))
PEAK_T4 = 65e12
FLOPS = 1e9


def recorded(
    kind: str, slots: tuple[int, ...], steps_s: dict[tuple[int, int], float], **more: object
) -> ProbedPool:
    """A pool with its probes: (workers, nodes) -> seconds of a step of 256 samples."""
    cores = 8.0 if kind == "cpu" else None
    device = "x86_64" if kind == "cpu" else kind
    shares = more.get("shares", {"data": 0.01, "compute": 0.99})
    half = more.get("half", 0.55)
    assert isinstance(shares, dict)
    assert isinstance(half, float)
    probes = [
        ProbeResult(
            place=Placement(workers, nodes, batch / workers, cores),
            batch=batch,
            step_s=seconds * (half if batch == 128 else 1),
            spread=0.01,
            start_s=10.0,
            evaluation_s=1.0,
            test_s=0.5,
            save_s=0.2,
            end_s=2.0,
            shares=shares,
            flops=FLOPS,
            device=device,
            mfu=FLOPS * batch / workers / seconds / PEAK_T4 if kind == "T4" else None,
        )
        for (workers, nodes), seconds in steps_s.items()
        for batch in (256, 128)
    ]
    return probed_pool(Pool(kind, slots, 8.0), probes, 256)


CPU = recorded("cpu", (8,), {(1, 1): 0.5, (2, 1): 0.3, (8, 1): 0.25})
T4 = recorded("T4", (4, 4, 4, 4), {(1, 1): 0.1, (2, 1): 0.06, (4, 1): 0.04, (8, 2): 0.03})


def found(options: Iterable[Option], **wanted: object) -> Option:
    same = [o for o in options if all(getattr(o, name) == value for name, value in wanted.items())]
    assert len(same) == 1, same
    return same[0]


def marked(made: Plan, mark: str) -> Option:
    return next(option for option in made.options if mark in option.marks)


def test_options_have_a_basis_and_wider_intervals_farther_from_the_probes() -> None:
    options = plan([CPU, T4], [], RUN).options
    basis = {
        (o.accelerator, o.workers): o.forecast.basis
        if isinstance(o.forecast, Forecast)
        else "unknown"
        for o in options
    }
    assert basis["cpu", 1] == basis["T4", 8] == "measured"
    assert basis["cpu", 4] == "interpolated"
    assert basis["T4", 16] == "extrapolated x 2"
    widths = [found(options, accelerator="T4", workers=workers).wall_s for workers in (8, 16)]
    assert all(widths)
    near, far = (w.high / w.low for w in widths if w)
    assert far > near
    assert options[0].wall_s is not None
    assert [o.wall_s.middle for o in options if o.wall_s] == sorted(
        o.wall_s.middle for o in options if o.wall_s
    )


def test_a_node_boundary_that_was_not_probed_is_unknown() -> None:
    one_node = recorded("T4", (4, 4), {(1, 1): 0.1, (2, 1): 0.06, (4, 1): 0.04})
    beyond = found(plan([one_node], [], RUN).options, workers=8)
    assert beyond.forecast == Unknown("no two nodes were probed together")
    assert beyond.cost is None
    assert plan([one_node], [], RUN).options[-1] is not None
    assert knee_of(one_node) <= 4


def test_rented_machines_have_options_on_demand_and_on_spot() -> None:
    machines = select_machines("name=g4dn.12xlarge,p4d.24xlarge,c7i.4xlarge", instances())
    made = plan([CPU, T4], machines, RUN)
    four = found(made.options, where="aws/us-east-1/g4dn.12xlarge", nodes=1, market="on demand")
    assert isinstance(four.forecast, Forecast)
    assert four.forecast.basis == "measured"
    assert four.usd is not None
    assert four.usd.middle == pytest.approx(four.forecast.wall_s.middle / 3600 * 3.912)
    two = found(made.options, where="aws/us-east-1/g4dn.12xlarge", nodes=2)
    assert isinstance(two.forecast, Forecast)
    assert two.usd is not None
    assert two.usd.middle == pytest.approx(2 * two.forecast.wall_s.middle / 3600 * 3.912)
    a100 = [o for o in made.options if o.where.endswith("p4d.24xlarge")]
    assert {o.market for o in a100} == {"on demand", "spot"}
    one = [o.forecast for o in a100 if o.nodes == 1]
    assert [each.basis for each in one if isinstance(each, Forecast)] == ["data sheet"] * 2
    assert {o.forecast for o in a100 if o.nodes == 2} == {
        Unknown("no two nodes were probed together")
    }
    assert a100[0].wall_s is not None
    assert a100[0].wall_s.high / a100[0].wall_s.low > 2
    other = found(made.options, where="aws/us-east-1/c7i.4xlarge")
    assert other.forecast == Unknown("another processor than the one that was probed")
    assert any("2026-07-20" in note for note in made.notes)  # the price's age
    assert any("reclaimed" in note for note in made.notes)
    cheap, fast = marked(made, "cheapest"), marked(made, "fastest")
    priced = [o for o in made.options if o.usd]
    assert cheap.usd is not None
    assert cheap.usd.middle == min(o.usd.middle for o in priced if o.usd)
    assert fast == made.options[0]
    assert marked(made, "greenest").kg_co2e is not None


def test_limits_keep_the_options_whose_whole_interval_fits() -> None:
    machines = select_machines("name=g4dn.12xlarge,p4d.24xlarge", instances())
    every = plan([CPU, T4], machines, RUN)
    limited = plan([CPU, T4], machines, RUN, deadline_s=900, budget_usd=3)
    assert 0 < len(limited.options) < len(every.options)
    assert len(limited.options) + limited.left_out == len(every.options)
    for option in limited.options:
        assert option.wall_s is not None
        assert option.usd is not None
        assert option.wall_s.high <= 900
        assert option.usd.high <= 3


def test_the_price_of_an_own_machine_is_that_of_the_spec() -> None:
    request = PlanRequest(RUN.length, cost=CostSpec(usd_per_h=2.0, g_co2e_per_kwh=100))
    option = plan([CPU], [], request).options[0]
    assert option.wall_s is not None
    assert option.usd is not None
    assert option.kg_co2e is not None
    assert option.usd.middle == pytest.approx(option.wall_s.middle / 1800)
    kwh = 8 * 3.0 * option.wall_s.middle / 3.6e6
    assert option.kg_co2e.middle == pytest.approx(kwh * 0.1)
    unpriced = plan([CPU], [], RUN).options[0]
    assert unpriced.cost is not None
    assert unpriced.cost.usd is None  # unknown is not nothing
    assert unpriced.cost.kg_co2e is None


def test_the_knee_is_marked() -> None:
    assert knee_of(CPU) == 2
    made = plan([CPU], [], RUN)
    assert marked(made, "knee").workers == 2
    assert "cpu: past 2 workers another one does not pay" in made.notes


@pytest.mark.parametrize(
    ("gpu", "cpu", "reason"),
    [
        pytest.param({"half": 0.97}, {"half": 0.55}, "launch-bound", id="launches"),
        pytest.param({"half": 0.97}, {"half": 0.95}, "sequential", id="sequence"),
        pytest.param({"shares": {"data": 0.7}}, {}, "transfer-bound", id="transfers"),
    ],
)
def test_the_cpu_is_recommended_with_the_reason(
    gpu: dict[str, object], cpu: dict[str, object], reason: str
) -> None:
    cpus = recorded("cpu", (8,), {(1, 1): 0.02, (2, 1): 0.015}, **cpu)
    (line,) = cpu_advice([cpus, recorded("T4", (1,), {(1, 1): 0.05}, **gpu)])
    assert line.startswith("the CPU is the better place: 17,067 samples/s against 5,120 on one T4")
    assert reason in line
    assert cpu_advice([CPU, T4]) == []


def test_pools_are_the_nodes_that_fit_the_spec() -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, object]:
        named = {name.replace("_type_", "_type:"): amount for name, amount in resources.items()}
        labels = {"heliostat.io/market": "spot", "ray.io/node-id": str(id(named))}
        return {"Alive": alive, "Resources": named, "Labels": labels, "NodeManagerHostname": "a"}

    nodes = [
        node(CPU=2),
        node(CPU=8, GPU=4, accelerator_type_T4=1),
        node(CPU=16, GPU=4, accelerator_type_T4=1),
        node(CPU=1, memory=5),
        node(alive=False, CPU=64),
        node(GPU=8, accelerator_type_H100=1),
    ]
    spec, _ = resolve({**find_spec("digits")[1], "scale": {"cpus_per_worker": 2}}, RunSpec)
    cpu, t4 = find_pools(nodes, spec)
    assert (cpu.accelerator, cpu.slots, cpu.cores) == ("cpu", (8, 4, 1), 2)
    assert (t4.accelerator, t4.slots, t4.cores) == ("T4", (4, 4), 8)
    assert t4.labels == {"heliostat.io/market": "spot"}
    assert [t4.nodes_for(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, None]
    assert t4.worker_counts(12) == [1, 2, 3, 4, 6]
    assert t4.counts_to_probe(64) == [1, 2, 4, 8]
    assert t4.counts_to_probe(3) == [1, 3]
    only = spec.model_copy(update={"scale": spec.scale.model_copy(update={"accelerator": "T4"})})
    assert [pool.accelerator for pool in find_pools(nodes, only)] == ["T4"]
