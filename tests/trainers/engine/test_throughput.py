"""The phases of a step, the rates that follow, MFU and goodput."""

import json
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.devices import Cpu, Cuda, DeviceMemory
from trainers.engine.throughput import STEP_PHASES, ThroughputMeter


class Clock:
    """A clock that is moved by hand, used as monotonic clock and as Unix time."""

    def __init__(self) -> None:
        self.s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.s


def meter(clock: Clock, samples: int = 32, **rest: Any) -> ThroughputMeter:
    return ThroughputMeter(samples, clock=clock, now=clock, **rest)


def spend(meter: ThroughputMeter, clock: Clock, part: Any, seconds: float) -> None:
    clock.s += seconds
    meter.mark(part)


class TestLaps:
    @given(
        st.lists(
            st.lists(st.tuples(st.sampled_from(STEP_PHASES), st.floats(0.001, 100))), min_size=1
        )
    )
    def test_parts_add_up_to_the_step(self, steps: list[list[tuple[Any, float]]]) -> None:
        clock = Clock()
        it = meter(clock)
        begin = clock()
        for laps in steps:
            for part, seconds in laps:
                spend(it, clock, part, seconds)
            it.count_step()
        found = it.read()
        assert found["perf/step_s"] == pytest.approx((clock() - begin) / len(steps))
        parts = [found.get(f"perf/{part}_s", 0.0) for part in STEP_PHASES]
        assert sum(parts) == pytest.approx(found["perf/step_s"])
        if any(steps):
            assert sum(
                found.get(f"perf/{part}_share", 0.0) for part in STEP_PHASES
            ) == pytest.approx(1)

    def test_rates(self) -> None:
        clock = Clock()
        it = meter(clock, samples=32, tokens=10, flops=1e9)
        for _ in range(4):
            spend(it, clock, "data", 0.1)
            spend(it, clock, "compute", 0.4)
            it.count_step()
        found = it.read()
        assert found["perf/samples_per_s"] == pytest.approx(64)
        assert found["perf/tokens_per_s"] == pytest.approx(640)
        assert found["perf/model_flop_per_s"] == pytest.approx(64e9)
        assert found["perf/data_share"] == pytest.approx(0.2)
        assert found["perf/compute_s"] == pytest.approx(0.4)
        # Nobody marked it, and nothing is known of the device.
        assert not found.keys() & {"perf/communication_share", "perf/mfu"}

    def test_starting_and_evaluating_are_not_step_time(self) -> None:
        clock = Clock()
        it = meter(clock)
        spend(it, clock, "start", 7)
        spend(it, clock, "compute", 2)
        it.count_step()
        spend(it, clock, "evaluation", 50)
        assert it.read()["perf/step_s"] == pytest.approx(2)
        assert it.samples_per_s() == pytest.approx(16)

    def test_a_read_is_of_the_steps_since_the_last_one(self) -> None:
        clock = Clock()
        it = meter(clock)
        for seconds in (1, 3):
            spend(it, clock, "compute", seconds)
            it.count_step()
            assert it.read()["perf/step_s"] == pytest.approx(seconds)
        assert it.read() == {}
        assert it.samples_per_s() == pytest.approx(32 * 2 / 4)

    def test_a_mark_costs_less_than_two_microseconds(self) -> None:
        it = ThroughputMeter(1)
        assert min(timeit.repeat(lambda: it.mark("data"), number=2000, repeat=20)) < 2000 * 2e-6

    def test_the_exchange_of_gradients_ends_with_the_next_mark(self) -> None:
        clock = Clock()
        it = meter(clock)
        clock.s += 1
        it.begin_exchange()
        spend(it, clock, "compute", 3)
        spend(it, clock, "compute", 4)
        it.count_step()
        found = it.read()
        assert found["perf/compute_s"] == pytest.approx(5)
        assert found["perf/communication_s"] == pytest.approx(3)


class TestTheDevice:
    def test_mfu_is_the_share_of_the_peak_of_all_devices(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Cuda, "name", "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(Cuda, "memory", lambda self: DeviceMemory(85_520_809_984, 0, 5_000))
        clock = Clock()
        it = meter(clock, samples=100, flops=1e12, device=Cuda(), world=4)
        spend(it, clock, "compute", 0.05)
        it.count_step()
        found = it.read()
        assert found["perf/mfu"] == pytest.approx(2000e12 / (4 * 989e12))
        assert found["perf/peak_memory_bytes"] == 5_000
        assert it.catalogued is not None
        assert it.catalogued.source

    def test_a_device_that_is_in_no_catalogue_has_no_mfu(self) -> None:
        clock = Clock()
        it = meter(clock, flops=1e12, device=Cpu())
        spend(it, clock, "compute", 1)
        it.count_step()
        found = it.read()
        assert "perf/mfu" not in found
        assert found["perf/peak_memory_bytes"] > 50_000_000


EVENTS = st.lists(
    st.tuples(st.sampled_from(["step", "save", "evaluate", "crash", "stop"]), st.floats(0.01, 1000))
)


class TestGoodput:
    @given(EVENTS)
    def test_is_the_time_of_steps_that_were_not_lost_over_all_time_but_pauses(
        self, events: list[tuple[str, float]]
    ) -> None:
        """Any history of a run, against a count kept by the test."""
        clock = Clock()
        begin = clock()
        it, saved = meter(clock), None
        useful, kept = 0.0, 0.0
        for event, seconds in events:
            if event == "step":
                spend(it, clock, "compute", seconds)
                it.count_step()
                useful += seconds
            elif event == "save":
                saved, kept = it.state_dict(stopped=False), useful
                spend(it, clock, "checkpoint", seconds)
            elif event == "evaluate":
                spend(it, clock, "evaluation", seconds)
            elif event == "crash":
                clock.s += seconds
                # Without a save the run begins anew, under the same command.
                it = meter(clock, started=None if saved else begin)
                it.load_state_dict(saved or {})
                useful = kept
            else:
                saved, kept = it.state_dict(stopped=True), useful
                clock.s += seconds
                it = meter(clock)
                it.load_state_dict(saved)
                # It is resumed by a new command; the next save says that it goes on.
                saved = it.state_dict(stopped=False)
        wall = sum(seconds for event, seconds in events if event != "stop")
        # A clock of Unix time has digits for 0.2 us.
        assert it.goodput() == pytest.approx(useful / wall if wall else 0, abs=1e-4)

    def test_starting_again_after_a_pause_counts_from_the_command(self) -> None:
        clock = Clock()
        first = meter(clock)
        spend(first, clock, "compute", 60)
        state = first.state_dict(stopped=True)
        clock.s += 1_000_000  # a holiday
        command = clock()
        clock.s += 30  # Ray starts, models are built
        second = meter(clock, started=command)
        second.load_state_dict(state)
        spend(second, clock, "start", 10)
        spend(second, clock, "compute", 20)
        assert second.goodput() == pytest.approx(80 / 120)

    def test_steps_done_again_count_once(self) -> None:
        clock = Clock()
        first = meter(clock)
        spend(first, clock, "compute", 10)
        state = first.state_dict(stopped=False)
        spend(first, clock, "compute", 10)  # lost
        second = meter(clock)
        second.load_state_dict(state)
        spend(second, clock, "compute", 10)
        assert second.goodput() == pytest.approx(20 / 30)

    @given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(-1000, 1000)), min_size=1))
    def test_a_clock_that_is_set_back_or_forward_does_not_matter(
        self, laps: list[tuple[float, float]]
    ) -> None:
        """Not within a start; between two, goodput stays below 1."""
        clock, unix = Clock(), Clock()
        it = ThroughputMeter(32, clock=clock, now=unix)
        for seconds, jump_s in laps:
            unix.s += jump_s
            spend(it, clock, "compute", seconds)
            spend(it, clock, "checkpoint", seconds)
            assert it.goodput() == pytest.approx(0.5)
        state = it.state_dict(stopped=False)
        unix.s += laps[0][1]
        again = ThroughputMeter(32, clock=clock, now=unix)
        again.load_state_dict(state)
        spend(again, clock, "compute", 1)
        assert 0 < again.goodput() < 1

    def test_flops_are_counted_once_in_a_run(self) -> None:
        first, second = meter(Clock()), meter(Clock())
        first.flops = 7.5
        second.load_state_dict(first.state_dict(stopped=False))
        assert second.flops == 7.5
        second.load_state_dict({})
        assert second.flops == 7.5

    def test_the_state_survives_json_beside_other_numbers(self) -> None:
        clock = Clock()
        it = meter(clock)
        spend(it, clock, "compute", 10)
        numbers = json.loads(json.dumps({"scale": 65536.0, **it.state_dict(stopped=False)}))
        again = meter(clock)
        again.load_state_dict(numbers)
        assert again.goodput() == it.goodput() == 1
        again.load_state_dict({"scale": 65536.0})  # from before there was a meter
        assert again.goodput() == 1


WORKER = """
import json, sys, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainers.engine.throughput import ThroughputMeter, measure_communication

rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)


def gradients(meter):
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    model = DistributedDataParallel(network, bucket_cap_mb=0.02, gradient_as_bucket_view=True)
    if meter:
        measure_communication(model, meter)
    torch.manual_seed(rank)
    for step in range(3):
        network.zero_grad()
        loss = model(torch.randn(8, 64)).square().mean()
        if meter:
            if step == 1:
                meter.read()  # buckets were made in the first step
            time.sleep(0.3 * rank)  # one is late for every exchange
        loss.backward()
        if meter:
            meter.mark("compute")
            meter.count_step()
    return [weight.grad.clone() for weight in network.parameters()]


plain = gradients(None)
meter = ThroughputMeter(8)
watched = gradients(meter)
same = all(torch.equal(a, b) for a, b in zip(plain, watched))
print(json.dumps({"same": same, **meter.read()}))
"""


def test_communication_is_the_exposed_part_of_the_exchange(tmp_path: Path) -> None:
    """Of two processes one is 0.3 s late each step: the other's wait is communication."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    waiting, late = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert waiting["same"]
    assert late["same"]
    assert waiting["perf/communication_s"] > 0.25
    assert waiting["perf/communication_share"] > 0.7
    assert late["perf/compute_s"] > 0.25
    assert late["perf/communication_share"] < 0.3
