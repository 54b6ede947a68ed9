"""Runs of Heliostat without Ray: in this process, or in a pair of processes for all runs."""

import multiprocessing
import os
import queue
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.base.errors import HeliostatError
from trainers.engine.loop import train
from trainers.engine.reporter import Reporter
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker

sys.path.append(str(Path(__file__).parent))  # for `wild_models`


HANGS_AFTER_S = 120.0


class Killed(BaseException):
    """Ends a run between two saves, as the loss of its machine does."""


class Recorder(Reporter):
    def __init__(self, killed_after: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, dict[str, float]] = {}
        self.steps, self._killed_after = 0, killed_after

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics:
            self.losses[step] = metrics["train/loss"]
        found = {k.removeprefix("val/"): v for k, v in metrics.items() if k.startswith("val/")}
        if found:
            self.evaluations[step] = found

    def on_step_end(self, step: int) -> None:
        self.steps = step
        if step == self._killed_after:
            raise Killed


@dataclass(frozen=True)
class Job:
    """One call of `trainers.engine.loop.train`."""

    data: dict[str, Any]
    """The plain data of the spec."""
    dataset: Path
    folder: Path
    killed_after: int | None = None


@dataclass
class Answer:
    losses: dict[int, float]
    evaluations: dict[int, dict[str, float]]
    steps: int
    error: str | None = None
    refused: bool = False


def run_job(job: Job, worker: Worker) -> Answer:
    """Train, up to the job's kill; errors are a part of the answer."""
    recorder = Recorder(job.killed_after)
    answer = Answer(recorder.losses, recorder.evaluations, 0)
    try:
        spec, workload = resolve(job.data, RunSpec)
        train(spec, workload, job.dataset, job.folder, recorder, worker)
    except Killed:
        pass
    except Exception as error:
        told = isinstance(error, HeliostatError)
        answer.error = str(error) if told else f"{type(error).__name__}: {error}"
        answer.refused = told and "\n" not in str(error)
        if os.environ.get("CONFORMANCE_TRACEBACKS"):
            traceback.print_exc()
    answer.steps = recorder.steps
    return answer


def _serve(rank: int, path: list[str], jobs: Any, answers: Any) -> None:
    """One process of the pair: takes jobs until it gets None."""
    sys.path[:] = path
    torch.set_num_threads(1)
    for job, meeting in iter(jobs.get, None):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        try:
            answer = run_job(job, Worker(rank, 2, local_world_size=2))
        finally:  # a rank that failed leaves the other one's collectives, which then fail too
            dist.destroy_process_group()
        answers.put(answer)


class Pair:
    """Two processes that train together, job after job."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pending: deque[Job] = deque()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs, self._answers = ([context.Queue() for _ in range(2)] for _ in range(2))
        self._processes = [
            context.Process(target=_serve, args=(rank, sys.path, jobs, answers), daemon=True)
            for rank, (jobs, answers) in enumerate(zip(self._jobs, self._answers, strict=True))
        ]
        for process in self._processes:
            process.start()

    def submit(self, job: Job) -> None:
        self._pending.append(job)
        self._send(job)

    def _send(self, job: Job) -> None:
        meeting = self._root / os.urandom(6).hex()
        for jobs in self._jobs:
            jobs.put((job, meeting))

    def result(self) -> Answer:
        """The answer to the next job in turn: rank 0's, or the error that tells the most.

        Processes that hang or die are replaced. A job has two attempts: the one before it may have
        left the processes broken.
        """
        job = self._pending.popleft()
        for left in ([job, *self._pending], [*self._pending]):
            try:
                found = [self._answer(rank) for rank in range(2)]
                break
            except queue.Empty:
                lost = [process.exitcode for process in self._processes]
                self.close()
                self._start()
                for each in left:
                    self._send(each)
        else:
            return Answer({}, {}, 0, f"hangs, or dies with exit codes {lost}")
        told = found[0]
        errors = [answer for answer in found if answer.error]
        if errors:  # the other one may only tell that its peer has gone
            told = min(errors, key=lambda answer: (not answer.refused, "peer" in str(answer.error)))
        elif (found[0].losses, found[0].evaluations) != (found[1].losses, found[1].evaluations):
            told.error = f"the workers report different numbers: {found[1].evaluations}"
        told.steps = max(answer.steps for answer in found)
        return told

    def _answer(self, rank: int) -> Answer:
        deadline = time.monotonic() + HANGS_AFTER_S
        while True:
            try:
                answer: Answer = self._answers[rank].get(timeout=1)
                return answer
            except queue.Empty:
                alive = all(process.is_alive() for process in self._processes)
                if not alive or time.monotonic() > deadline:
                    raise

    def close(self) -> None:
        """End both processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()
