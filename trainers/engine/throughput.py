"""How fast a run goes, where its time goes, and how much of it was of use."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.autograd import Variable
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from trainers.devices import Device
from trainers.workload import Batch, Workload, model_dtype

Phase = Literal["start", "data", "compute", "communication", "checkpoint", "other", "evaluation"]
STEP_PHASES: tuple[Phase, ...] = ("data", "compute", "communication", "checkpoint", "other")
"""What a step's time is made of; starting and evaluating are kept apart."""
USEFUL_PHASES: tuple[Phase, ...] = ("data", "compute", "communication")
"""What brings a run forward; saving guards against losses, and is one of the costs of them."""

_USEFUL_S, _WALL_S = "goodput.useful_s", "goodput.wall_s"
_SAVED_S, _STOPPED = "goodput.saved_unix_s", "goodput.stopped"


class ThroughputMeter:
    """Laps of the steps of one worker, and what follows from them.

    Times are the host's. A GPU computes behind the host's back, so that what the host waits for
    shows where it waits: mark `data` before a batch is copied to the device, and `compute` after
    the loss has been read, where a report waits for the device anyway. Nothing else waits: over
    the steps between two reports the shares are right, within one step they are not.
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
        """The first lap begins.

        `samples` of `tokens` each are in a step, over all `world` workers together; `flops` are
        those of one sample, as `count_flops` gives them. `started` is the Unix time at which the
        command that trains was given, this moment when None.
        """
        self._samples, self._tokens, self.flops = samples, tokens, flops
        self._device, self._world = device, world
        self.catalogued = device.catalog_entry() if device else None
        """The device as the catalogue has it; MFU is the share of its peak, with its source."""
        self._clock, self._now = clock, now
        self._started = now() if started is None else started
        self._useful_s = self._wall_s = 0.0  # of the run before this start
        self._total_s: dict[Phase, float] = dict.fromkeys(
            ("start", *STEP_PHASES, "evaluation"), 0.0
        )
        self._steps = 0
        self._read_s, self._read_steps = dict(self._total_s), 0
        self._last = clock()

    def mark(self, phase: Phase) -> None:
        """Charge the time since the last mark to a part; 0.2 us."""
        now = self._clock()
        self._total_s[phase] += now - self._last
        self._last = now

    def count_step(self) -> None:
        """A step is done."""
        self._steps += 1

    def unreported_s(self) -> float:
        """Seconds of steps since the last read."""
        return sum(self._total_s[part] - self._read_s[part] for part in STEP_PHASES)

    def samples_per_s(self) -> float:
        """Samples per second over all workers, since this start, evaluation left out."""
        return _rate(self._steps * self._samples, sum(self._total_s[part] for part in STEP_PHASES))

    def goodput(self) -> float:
        """Share of the time since the run first started in which steps were done that count.

        Against it count starting, evaluating, saving, and after a crash the steps that are done
        again and all the time since the save from which the run went on; not a pause that was
        wanted.
        """
        return _rate(self._useful_now(), self._wall_now())

    def read(self) -> dict[str, float]:
        """Means over the steps since the last read, as `perf/...`; empty when there are none.

        Seconds are of a step; shares are of its time; memory and goodput are those of now.
        """
        steps = self._steps - self._read_steps
        if not steps:
            return {}
        spent_s = {part: self._total_s[part] - self._read_s[part] for part in STEP_PHASES}
        self._read_s, self._read_steps = dict(self._total_s), self._steps
        step_s = sum(spent_s.values()) / steps
        found = {"step_s": step_s, "samples_per_s": _rate(self._samples, step_s)}
        for part, part_s in spent_s.items():
            if self._total_s[part]:  # nobody looks at what was never marked
                found[f"{part}_s"] = part_s / steps
                found[f"{part}_share"] = _rate(part_s / steps, step_s)
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
        """What goodput needs of this run when it goes on from here; kept with a checkpoint.

        `stopped` says that the run ends here because somebody wanted it to.
        """
        return {
            _USEFUL_S: self._useful_now(),
            _WALL_S: self._wall_now(),
            _SAVED_S: self._now(),
            _STOPPED: float(stopped),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a save; one without what `state` gives changes nothing."""
        if not state.keys() >= {_USEFUL_S, _WALL_S, _SAVED_S, _STOPPED}:
            return
        self._useful_s, self._wall_s = state[_USEFUL_S], state[_WALL_S]
        saved_s, now_s = state[_SAVED_S], self._now()
        if not state[_STOPPED]:  # all that came after the save was lost
            self._started = min(saved_s, now_s)
        elif self._started < saved_s:  # paused under the command that goes on with it
            self._started = now_s

    def _useful_now(self) -> float:
        return self._useful_s + sum(self._total_s[part] for part in USEFUL_PHASES)

    def _wall_now(self) -> float:
        return self._wall_s + self._now() - self._started


def _rate(amount: float, of: float) -> float:
    return amount / of if of > 0 else 0.0


def measure_communication(model: DistributedDataParallel, meter: ThroughputMeter) -> None:
    """Have the meter charge the exposed part of the gradient exchange to `communication`.

    That is what a backward pass takes after its last bucket was handed over: what could not be
    hidden behind computing, and waiting for slower workers. On CPUs only: a GPU's host does not
    wait there, and its exchange stays within `compute`, as does that of sharded models.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    engine = Variable._execution_engine

    def hook(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        future = allreduce_hook(group, bucket)
        if bucket.is_last():
            meter.mark("compute")
            # DDP waits for the buckets in such a callback too, which it queues after this hook.
            engine.queue_callback(
                lambda: engine.queue_callback(lambda: meter.mark("communication"))
            )
        return future

    model.register_comm_hook(None, hook)


def count_flops(workload: Workload, network: nn.Module, batch: Batch) -> float | None:
    """Floating-point operations of one sample, forward and backward, by the model's formulas.

    Products and convolutions count, at two for a multiplication with its addition; recomputing
    does not, so give the network before it is wrapped in anything. `batch` [B, ...] is best
    small, and of 2 or more where samples are normalised together. Nothing is computed: shapes
    are passed through a copy without memory, and network, batch and random state stay as they
    are. None when the model cannot be run so, as when it asks for a value.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        # Fused attention has no formula on a CPU; its plain form has the same products.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), fake:
            model = _fake_copy(network).train()
            dtype = model_dtype(model)
            columns = {
                name: _empty(values, dtype if values.is_floating_point() else values.dtype)
                for name, values in batch.items()
            }
            with counter:
                loss_B = workload.loss(workload.forward(model, columns), columns)
                torch.autograd.backward(loss_B.sum())
    except Exception:  # a user's model may do anything
        return None
    return counter.get_total_flops() / len(next(iter(batch.values())))


def _fake_copy(network: nn.Module) -> nn.Module:
    """A copy of the network on the CPU, to be made where tensors are fake."""
    copies: dict[int, Any] = {}
    for module in network.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for tensor in held.values():
                if isinstance(tensor, nn.Parameter):
                    bare = _empty(tensor, tensor.dtype)
                    copies[id(tensor)] = nn.Parameter(bare, tensor.requires_grad)
                elif isinstance(tensor, Tensor):
                    copies[id(tensor)] = _empty(tensor, tensor.dtype)
    return copy.deepcopy(network, copies)


def _empty(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype)
