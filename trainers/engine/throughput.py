"""How fast a run goes, where its time goes, and its goodput."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from trainers.devices import Device

Phase = Literal["start", "data", "compute", "communication", "checkpoint", "other", "evaluation"]
STEP_PHASES: tuple[Phase, ...] = ("data", "compute", "communication", "checkpoint", "other")
"""The phases of a step; starting and evaluating are counted apart."""
USEFUL_PHASES: tuple[Phase, ...] = ("data", "compute", "communication")
"""The phases that count as goodput; saving is a cost of possible failures."""

_USEFUL_S, _WALL_S = "goodput.useful_s", "goodput.wall_s"
_SAVED_S, _STOPPED = "goodput.saved_unix_s", "goodput.stopped"
_FLOPS = "goodput.flops_per_sample"


class ThroughputMeter:
    """Measures the phases of one worker's steps; rates, MFU and goodput follow from them.

    Times are the host's. A GPU computes asynchronously, so its time shows where the host waits for
    it: mark `data` before a batch is copied to the device, and `compute` after the loss has been
    read, where a report waits for the device anyway. Nothing else waits: the shares are right over
    the steps between two reports, not within one step.
    """

    def __init__(
        self,
        samples: int,
        *,
        tokens: int | None = None,
        flops: float | None = None,
        device: Device | None = None,
        world: int = 1,
        started: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Begin the first lap.

        A step has `samples` of `tokens` each, over all `world` workers together. `flops` are those
        of one sample, as `count_flops` gives them. `started` is the Unix time of the user's
        command, now when None. `clock` is monotonic, `now` is Unix time; both in seconds.
        """
        self._samples, self._tokens, self.flops = samples, tokens, flops
        self._device, self._world = device, world
        self.catalogued = device.catalog_entry() if device else None
        """The device's entry in the catalogue, if any; MFU is relative to its peak FLOP/s."""
        self._clock, self._now = clock, now
        self._started = now() if started is None else started
        # Wall time is counted on the monotonic clock: Unix time may be set back meanwhile.
        self._wall_origin = clock() - max(0.0, now() - self._started)
        self._useful_s = self._wall_s = 0.0  # of the run before this start
        self._total_s: dict[Phase, float] = dict.fromkeys(
            ("start", *STEP_PHASES, "evaluation"), 0.0
        )
        self._steps = 0
        self._read_s, self._read_steps = dict(self._total_s), 0
        self._exchanging = False
        self._last = clock()

    def mark(self, phase: Phase) -> None:
        """Charge the time since the last mark to `phase`; takes 0.2 us."""
        now = self._clock()
        if self._exchanging:
            phase, self._exchanging = "communication", False
        self._total_s[phase] += now - self._last
        self._last = now

    def begin_exchange(self) -> None:
        """Charge the time until now to `compute`, and that until the next mark to `communication`.

        So the mark after a backward pass counts the exchange of gradients at its end.
        """
        self.mark("compute")
        self._exchanging = True

    def count_step(self) -> None:
        """Count one more step."""
        self._steps += 1

    def unreported_s(self) -> float:
        """Seconds of steps since the last read."""
        return sum(self._total_s[phase] - self._read_s[phase] for phase in STEP_PHASES)

    def samples_per_s(self) -> float:
        """Samples per second over all workers, since this start, evaluation left out."""
        return _rate(
            self._steps * self._samples, sum(self._total_s[phase] for phase in STEP_PHASES)
        )

    def goodput(self) -> float:
        """The share of the run's wall time that was spent on steps that were not lost.

        Starting, evaluating and saving lower it. After a crash, so does all the time since the
        checkpoint from which the run goes on. A wanted pause is not wall time.
        """
        return _rate(self._useful_now(), self._wall_now())

    def read(self) -> dict[str, float]:
        """Means over the steps since the last read, as `perf/...`; empty without new steps.

        Seconds are per step, shares are of its time; memory and goodput are those of now.
        """
        steps = self._steps - self._read_steps
        if not steps:
            return {}
        spent_s = {phase: self._total_s[phase] - self._read_s[phase] for phase in STEP_PHASES}
        self._read_s, self._read_steps = dict(self._total_s), self._steps
        step_s = sum(spent_s.values()) / steps
        found = {"step_s": step_s, "samples_per_s": _rate(self._samples, step_s)}
        for phase, phase_s in spent_s.items():
            if self._total_s[phase]:  # a phase that was never marked is of no interest
                found[f"{phase}_s"] = phase_s / steps
                found[f"{phase}_share"] = _rate(phase_s / steps, step_s)
        if self._tokens is not None:
            found["tokens_per_s"] = found["samples_per_s"] * self._tokens
        if self.flops is not None:
            speed = found["model_flop_per_s"] = found["samples_per_s"] * self.flops
            if self.catalogued and self.catalogued.peak_flop_per_s:
                found["mfu"] = speed / self._world / self.catalogued.peak_flop_per_s
        if self._device and (peak := self._device.memory().peak) is not None:
            found["peak_memory_bytes"] = float(peak)
        found["goodput"] = self.goodput()
        return {f"perf/{name}": value for name, value in found.items()}

    def state_dict(self, stopped: bool) -> dict[str, float]:
        """The counters of goodput and the FLOPs, for a checkpoint.

        `stopped` says that the run ends here on request, not at its last step.
        """
        return {
            _USEFUL_S: self._useful_now(),
            _WALL_S: self._wall_now(),
            _SAVED_S: self._now(),
            _STOPPED: float(stopped),
            **({} if self.flops is None else {_FLOPS: self.flops}),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint; one without these counters changes nothing."""
        self.flops = state.get(_FLOPS, self.flops)
        if not state.keys() >= {_USEFUL_S, _WALL_S, _SAVED_S, _STOPPED}:
            return
        self._useful_s, self._wall_s = state[_USEFUL_S], state[_WALL_S]
        saved_s = state[_SAVED_S]
        if not state[_STOPPED]:  # everything after the save was lost
            self._wall_origin = self._clock() - max(0.0, self._now() - saved_s)
        elif self._started < saved_s:  # paused and resumed under one command
            self._wall_origin = self._clock()

    def _useful_now(self) -> float:
        return self._useful_s + sum(self._total_s[phase] for phase in USEFUL_PHASES)

    def _wall_now(self) -> float:
        return self._wall_s + self._clock() - self._wall_origin


def _rate(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0


def measure_communication(model: DistributedDataParallel, meter: ThroughputMeter) -> None:
    """Have the meter charge the exposed part of the gradient exchange to `communication`.

    That is the rest of a backward pass after its last bucket was handed over: the exchange that
    could not be hidden behind computation, and waiting for slower workers. On CPUs only: a GPU's
    host does not wait there, and its exchange counts as `compute`, as that of sharded models does.
    """
    if next(model.parameters()).device.type != "cpu":
        return

    def hook(
        group: Any,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        future = allreduce_hook(group, bucket)
        if bucket.is_last():
            meter.begin_exchange()
        return future

    model.register_comm_hook(None, hook)
