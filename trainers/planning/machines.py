"""What a node of some kind costs, draws and emits while a run holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.base.labels import INSTANCE, MARKET, ON_DEMAND, PROVIDER, REGION, SPOT
from cluster.cost.catalog import Accelerator, Instance, accelerators
from cluster.cost.node_rates import CostSpec, NodeRate, node_rate
from cluster.cost.power_sources import CPU_W_PER_THREAD
from cluster.cost.user_prices import UserPrices
from trainers.planning.forecast import Interval
from trainers.planning.pools import ProbedPool

DEVICE_POWER_SHARE = Interval(0.5, 0.75, 1.0)
"""Of its limit that a device draws in training: estimates by utilisation are within 30 %."""
HOST_POWER_SHARE = 0.4
"""What the host draws beside its devices, as a share of theirs: GPUs are about 70 % of a
server's power in training (Zeus' documentation, ml.energy)."""


@dataclass(frozen=True)
class Machine:
    """One node: its rate, and the power that it draws for a run."""

    rate: NodeRate
    watts: Interval | None
    """None where that is not known."""
    covers: str
    """What of it the watts are those of."""


@dataclass(frozen=True)
class RunCost:
    """What a run costs, each None where it is not known."""

    usd: Interval | None
    kwh: Interval | None
    kg_co2e: Interval | None


def run_cost(machine: Machine, nodes: int, wall_s: Interval) -> RunCost:
    """So many nodes, held for so long."""
    rate, hours = machine.rate, wall_s.times(nodes / 3600)
    usd = hours.times(rate.usd_per_h) if rate.usd_per_h is not None else None
    kwh = hours.times(machine.watts.times(1e-3)) if machine.watts else None
    emitted = rate.kg_co2e(3.6e6)
    kg = kwh.times(emitted) if kwh is not None and emitted is not None else None
    return RunCost(usd, kwh, kg)


def local_machine(
    probed: ProbedPool, workers_per_node: int, own: UserPrices, spec: CostSpec
) -> Machine:
    """A node of a pool that is there."""
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
    """A machine of the catalogue, at the prices of `known`, of the snapshot when None."""
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
    if device is None or device.power_w is None:
        return None, ""
    return DEVICE_POWER_SHARE.times(device.power_w * count * (1 + HOST_POWER_SHARE)), "gpu and host"


def find_device(name: str) -> Accelerator | None:
    """The catalogue's row of this name."""
    return next((device for device in accelerators() if device.name == name), None)


def device_of_instance(instance: Instance) -> Accelerator | None:
    """What the machine has in it, where its kind and memory leave no doubt."""
    memory = instance.accelerator_memory_bytes
    if memory is None:
        return None
    same = [
        device
        for device in accelerators()
        if device.ray_accelerator_type == instance.ray_accelerator_type
        and abs(memory / device.memory_bytes - 1) < 0.15
    ]
    # Clouds that do not say otherwise have modules on a board, not cards.
    usual = [each for each in same if "PCIe" not in each.name and "NVL" not in each.name]
    exact = [each for each in same if each.name.startswith(instance.accelerator)]
    for choice in (exact, same, usual):
        if len(choice) == 1:
            return choice[0]
    return None
