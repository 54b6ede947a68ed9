"""Errors of workers: whether Ray Train restarts the workers, and the line that a user reads."""

import traceback
from collections.abc import Mapping
from pathlib import Path

from cluster.base.errors import HeliostatError, TrainingError
from trainers.engine.stall_files import STALLS
from trainers.runs.ray_train_internals import RetryDecision
from trainers.runs.stalls import last_stall


class PeerLostError(Exception):
    """A collective failed because a peer died; restart the worker group."""


class PeerPreemptedError(Exception):
    """A collective failed because a peer's machine was preempted; restart the worker group."""


def decide_retry(failures: Mapping[int, Exception]) -> RetryDecision:
    """Whether to restart the workers, from the exception of each failed worker.

    Ray Train by itself restarts them after an exception in the user's code as it does after a
    lost machine, so that the user would see a mistake after the last attempt only.
    """
    if any(isinstance(failure, HeliostatError) for failure in failures.values()):
        return "raise"
    if any(isinstance(failure, PeerPreemptedError) for failure in failures.values()):
        return "retry"  # not counted: Ray does not count the preemption that caused it either
    return "count"


def is_peer_loss(error: Exception) -> bool:
    """Whether a collective failed because another worker died."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def format_error(error: Exception) -> str:
    """One line: the error, and its place in the code."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    if isinstance(error, HeliostatError):
        return message
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message} ({frame.filename}:{frame.lineno})"


def failure_reason(error: BaseException, folder: Path) -> HeliostatError:
    """Why Ray Train gave up on the run in `folder`, in one line.

    `error` is the exception that the trainer's `fit` raised.
    """
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(failure, HeliostatError):
            return failure
    stall = last_stall(folder / STALLS, failures)
    if stall:
        return TrainingError(f"{stall}; it was lost too often (scale.max_restarts)")
    if failures:
        rank, failure = next(iter(failures.items()))
        return TrainingError(f"worker {rank} was lost too often: {type(failure).__name__}")
    return TrainingError(f"{type(error).__name__}: {error}".splitlines()[0])
