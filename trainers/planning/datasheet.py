"""How fast a run would be on a device that nobody has tried it on: a guess, within a factor of 2.

A step is the model's operations at a share of the device's peak, and what a step takes here
whatever its batch: starting each operation is the host's work, wherever it is computed. That
share (MFU) is between 20 and 50 % for models that fill a device; how many operations a small
model starts decides more than any data sheet.
"""

from trainers.planning.forecast import Interval
from trainers.planning.pools import ProbedPool
from trainers.planning.step_time import Unknown

TYPICAL_MFU = (0.2, 0.5)
"""Model FLOP/s over the peak: what training reaches on accelerators as a rule."""
DATASHEET_ERROR = 1.0
"""Relative: a factor of 2 either way, for one device."""
DATASHEET_MULTI_DEVICE_ERROR = 2.0
"""A factor of 3 for several devices of a node, whose exchange nobody has measured."""


def datasheet_step_s(
    probed: ProbedPool, peak_flop_per_s: float | None, workers: int, nodes: int
) -> Interval | Unknown:
    """Seconds of a step of the run on so many devices, from what was probed on another kind."""
    if nodes > 1:
        return Unknown("no two nodes were probed together")
    flops = probed.single_worker.flops
    if flops is None:
        return Unknown("the model's operations cannot be counted")
    if peak_flop_per_s is None:
        return Unknown("the device's peak is not in the catalogue")
    usual = (TYPICAL_MFU[0] * TYPICAL_MFU[1]) ** 0.5
    computing = flops * probed.batch / workers / (peak_flop_per_s * usual)
    starting = min(probed.step_time_model.terms["each step"], probed.single_worker.step_s)
    return Interval.around(
        computing + starting, DATASHEET_ERROR if workers == 1 else DATASHEET_MULTI_DEVICE_ERROR
    )
