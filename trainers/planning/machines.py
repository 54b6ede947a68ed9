"""What is known of a machine without a probe: price, power, emissions, and a guess of its speed.

`datasheet_step_s` guesses the step time on a device that was not probed, within a factor of 2: the
model's operations at a share of the device's peak (MFU), plus the part of a step's time here that
does not depend on the batch, since starting operations is the work of the host, wherever they are
computed. Models that fill a device reach 20 to 50 % of its peak; for a small model, the number of
operations decides more than any data sheet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.base.labels import INSTANCE, MARKET, ON_DEMAND, PROVIDER, REGION, SPOT
from cluster.cost.catalog import Accelerator, Instance, accelerators
from cluster.cost.node_rates import CostSpec, NodeRate, node_rate
from cluster.cost.power_sources import CPU_W_PER_THREAD
from cluster.cost.user_prices import UserPrices
from trainers.planning.forecast import Interval
from trainers.planning.pools import ProbedPool
from trainers.planning.step_time import Unknown

DEVICE_POWER_SHARE = Interval(0.5, 0.75, 1.0)
"""Share of its power limit that a device draws in training, within 30 %."""
HOST_POWER_SHARE = 0.4
"""Power of the host without its devices, as a share of the devices': GPUs draw about 70 % of a
server's power in training (Zeus' documentation, ml.energy)."""
TYPICAL_MFU = (0.2, 0.5)
"""Model FLOP/s over the device's peak that training usually reaches on accelerators."""
DATASHEET_ERROR = 1.0
"""Relative error of a guess for one device: a factor of 2 either way."""
DATASHEET_MULTI_DEVICE_ERROR = 2.0
"""For several devices of a node, whose exchange was not measured: a factor of 3 either way."""


@dataclass(frozen=True)
class Machine:
    """One node: its rate, and its power while it trains."""

    rate: NodeRate
    watts: Interval | None
    """None if unknown."""
    covers: str
    """The parts of the node that `watts` includes."""


@dataclass(frozen=True)
class RunCost:
    """The cost of a run; amounts that are unknown are None."""

    usd: Interval | None
    kwh: Interval | None
    kg_co2e: Interval | None


def run_cost(machine: Machine, nodes: int, wall_s: Interval) -> RunCost:
    """The cost of `nodes` machines for `wall_s` seconds."""
    rate, hours = machine.rate, wall_s.times(nodes / 3600)
    usd = hours.times(rate.usd_per_h) if rate.usd_per_h is not None else None
    kwh = hours.times(machine.watts.times(1e-3)) if machine.watts else None
    kg_per_kwh = rate.kg_co2e(3.6e6)
    kg = kwh.times(kg_per_kwh) if kwh is not None and kg_per_kwh is not None else None
    return RunCost(usd, kwh, kg)


def local_machine(
    probed: ProbedPool, workers_per_node: int, own: UserPrices, spec: CostSpec
) -> Machine:
    """A node of a pool of the cluster."""
    pool = probed.pool
    rate = node_rate(pool.host, pool.labels, spec, own)
    known = own.find_machine(pool.host)
    if known is not None:
        return Machine(rate, Interval(*[known[1].power_w] * 3), "host")
    if pool.on_cpus:
        return Machine(rate, Interval(*CPU_W_PER_THREAD).times(pool.cores), "cpu")
    return Machine(rate, *_power_drawn(find_device(probed.single_worker.device), workers_per_node))


def rented_machine(
    instance: Instance, spot: bool, own: UserPrices, known: Sequence[Instance] | None = None
) -> Machine:
    """A machine of the catalogue, at the prices of `known`; at those of the snapshot when None."""
    labels: Mapping[str, str] = {
        PROVIDER: instance.provider,
        INSTANCE: instance.name,
        REGION: instance.region,
        MARKET: SPOT if spot else ON_DEMAND,
    }
    rate = node_rate("", labels, CostSpec(), own, known)
    if not instance.accelerators:
        return Machine(rate, Interval(*CPU_W_PER_THREAD).times(instance.vcpus), "cpu")
    return Machine(rate, *_power_drawn(device_of_instance(instance), instance.accelerators))


def _power_drawn(device: Accelerator | None, count: int) -> tuple[Interval | None, str]:
    """The watts of a node with `count` devices, and the parts that they include."""
    if device is None or device.power_w is None:
        return None, ""
    return DEVICE_POWER_SHARE.times(device.power_w * count * (1 + HOST_POWER_SHARE)), "gpu and host"


def find_device(name: str) -> Accelerator | None:
    """The accelerator of this name in the catalogue."""
    return next((device for device in accelerators() if device.name == name), None)


def device_of_instance(instance: Instance) -> Accelerator | None:
    """The accelerator in a machine; None if its type and memory leave more than one."""
    memory = instance.accelerator_memory_bytes
    if memory is None:
        return None
    same = [
        device
        for device in accelerators()
        if device.ray_accelerator_type == instance.ray_accelerator_type
        and abs(memory / device.memory_bytes - 1) < 0.15
    ]
    # Clouds that say nothing else have modules on a board, not cards.
    usual = [each for each in same if "PCIe" not in each.name and "NVL" not in each.name]
    exact = [each for each in same if each.name.startswith(instance.accelerator)]
    for choice in (exact, same, usual):
        if len(choice) == 1:
            return choice[0]
    return None


def datasheet_step_s(
    probed: ProbedPool, peak_flop_per_s: float | None, workers: int, nodes: int
) -> Interval | Unknown:
    """The step time on `workers` devices, in seconds, from probes of another kind of device."""
    if nodes > 1:
        return Unknown("no two nodes were probed together")
    flops = probed.single_worker.flops
    if flops is None:
        return Unknown("the model's operations cannot be counted")
    if peak_flop_per_s is None:
        return Unknown("the device's peak is not in the catalogue")
    typical_mfu = (TYPICAL_MFU[0] * TYPICAL_MFU[1]) ** 0.5
    compute_s = flops * probed.batch / workers / (peak_flop_per_s * typical_mfu)
    launch_s = min(probed.step_time_model.terms["each step"], probed.single_worker.step_s)
    error = DATASHEET_ERROR if workers == 1 else DATASHEET_MULTI_DEVICE_ERROR
    return Interval.around(compute_s + launch_s, error)
