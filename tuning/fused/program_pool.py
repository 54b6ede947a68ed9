"""The programs of an engine, the trials in their slots, and the trials that wait for one.

Used by the engine's computing thread only.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from cluster.connection.run_gauges import set_gauge
from trainers.devices import Device
from trainers.modeling.build import build_network
from trainers.modeling.optimizer import build_optimizer
from trainers.spec import RunSpec
from trainers.workload import Batch
from tuning.fused.engine_trial import EngineTrial
from tuning.fused.sweep_variants import reference_variant, varied_floats
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant
from tuning.trials.trial import Sweep

MAX_IDLE_PROGRAMS = 4
"""Programs without trials that are kept for later trials."""


@dataclass(eq=False)
class ProgramSlots:
    """A program, and the trials in its slots."""

    program: Program
    trials: dict[int, EngineTrial] = field(default_factory=dict)
    step_s: float = 1e-3
    """Time of its last step."""

    def free_slot(self) -> int | None:
        empty = [slot for slot in range(self.program.slots) if slot not in self.trials]
        return empty[0] if empty else None


class ProgramPool:
    """The programs of one device; compiles one when a trial fits none of them."""

    def __init__(
        self,
        sweep: Sweep,
        slots: int,
        samples_of: Callable[[RunSpec], Batch],
        device: Device,
        program: Program | None,
    ) -> None:
        """`slots` are those of each program, `program` is the first one, if there is one.

        `samples_of` gives the training split of a trial with this spec.
        """
        self._sweep, self._slots = sweep, slots
        self._samples_of, self._device = samples_of, device
        self.programs = [ProgramSlots(program)] if program else []
        self._waiting: list[EngineTrial] = []

    @property
    def waiting(self) -> list[EngineTrial]:
        """The trials that wait for a slot, as a copy."""
        return list(self._waiting)

    def trials_in_slots(self) -> int:
        return sum(len(each.trials) for each in self.programs)

    def compile_reference_program(self) -> None:
        """Compile the program that most trials will need, before the first one asks for it."""
        variant = reference_variant(self._sweep)
        with contextlib.suppress(Exception):  # the trial that meets the error again reports it
            self._program_for(variant, build_network(variant.spec.train, variant.workload))

    def wait_for_slot(self, trial: EngineTrial) -> None:
        self._waiting.append(trial)

    def stop_waiting(self, trial: EngineTrial) -> None:
        with contextlib.suppress(ValueError):
            self._waiting.remove(trial)

    def load(self, trial: EngineTrial) -> bool:
        """Put a trial into a slot, from its latest checkpoint; False if its program has none free.

        Raises what building the network, reading the checkpoint or compiling raises.
        """
        spec, workload = trial.variant.spec, trial.variant.workload
        if trial.network is None:
            trial.network = build_network(spec.train, workload)
            trial.program_slots = self._program_for(trial.variant, trial.network)
        assert trial.program_slots is not None
        program, slot = trial.program_slots.program, trial.program_slots.free_slot()
        if slot is None:
            return False
        network, trial.network = trial.network, None
        optimizer = build_optimizer(spec.optimizer, network)
        done, scalars = trial.checkpoints.resume(network, optimizer)
        state = program.state_from(network, optimizer, done) if done else None
        program.load_trial(slot, trial.variant, network, state)
        trial.program_slots.trials[slot] = trial
        trial.slot, trial.steps_done, trial.saved_step = slot, done, done
        trial.loss_sum, trial.losses = scalars.get("loss_sum", 0.0), int(scalars.get("losses", 0))
        trial.device_s = scalars.get("device_s", trial.device_s)
        trial.evaluated_state = program.state_of(slot).copy() if done else None
        trial.saved_scalars = dict(scalars)
        self.stop_waiting(trial)
        self._export_gauges()
        return True

    def free(self, trial: EngineTrial) -> None:
        """Empty the slot of a trial, if it has one."""
        held = trial.program_slots
        if held is not None and held.trials.get(trial.slot) is trial:
            del held.trials[trial.slot]
            held.program.free(trial.slot)
            self._export_gauges()

    def _program_for(self, variant: Variant, network: nn.Module) -> ProgramSlots:
        for each in self.programs:
            if each.program.fits(variant, network):
                return each
        awaited = [trial.program_slots for trial in self._waiting]
        idle = [each for each in self.programs if not each.trials and each not in awaited]
        for each in idle[: len(idle) - MAX_IDLE_PROGRAMS + 1]:
            self.programs.remove(each)
        varied = varied_floats(self._sweep, variant)
        samples = self._samples_of(variant.spec)
        program = Program(variant, self._slots, samples, self._device, varied)
        program.compile()
        self.programs.append(ProgramSlots(program))
        return self.programs[-1]

    def _export_gauges(self) -> None:
        slots = sum(each.program.slots for each in self.programs)
        set_gauge("heliostat_slots", slots, self._sweep.key)
        set_gauge("heliostat_slots_in_use", self.trials_in_slots(), self._sweep.key)
