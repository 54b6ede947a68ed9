"""The names of the metrics that an evaluation will report, known before anything is trained."""

import contextlib
import io
import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow.parquet as pq
import torch

from trainers.data.splits import read_dataset_manifest, split_files
from trainers.data.tables import column_tensor
from trainers.engine.evaluate import evaluate
from trainers.modeling.build import build_network
from trainers.modeling.forward import Forward
from trainers.modeling.lazy_modules import give_shapes
from trainers.modeling.model_inputs import convert_inputs
from trainers.precision import weights_dtype
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload

SAMPLES = 2
MAX_WEIGHTS = 20_000_000
"""A larger model is not built to look at its metrics."""
TIMEOUT_S = 20.0
"""Seconds after which it is left to the first evaluation to tell."""


def validation_metrics(spec: RunSpec, workload: Workload, dataset: Path) -> list[str] | None:
    """The metrics `val/...` that the workload's evaluations report; None if that cannot be told.

    The model, if it is small, and its metrics are tried on two samples. That is done in a forked
    process, which the user's code may change, block or end as it likes.
    """
    samples = _first_samples(dataset)
    if samples is None:
        return None
    ours, its = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=_send_names, args=(its, spec, workload, samples), daemon=True)
    process.start()
    its.close()
    try:
        found: list[str] | None = ours.recv() if ours.poll(TIMEOUT_S) else None
    except EOFError:  # the process was ended by the user's code
        found = None
    finally:
        process.kill()
        process.join()
        ours.close()
    return found


def _first_samples(dataset: Path) -> Batch | None:
    files = split_files("val", read_dataset_manifest(dataset)["files"])
    first = dataset / files[0] if files else None
    if first is None or not first.exists():
        return None
    with pq.ParquetFile(first) as file:
        rows = next(file.iter_batches(batch_size=SAMPLES), None)
        table = None if rows is None else file.schema_arrow.empty_table().from_batches([rows])
    if table is None:
        return None
    return {field.name: column_tensor(field, table.column(field.name)) for field in table.schema}


def _send_names(connection: Connection, spec: RunSpec, workload: Workload, samples: Batch) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    names = None
    with (
        contextlib.suppress(Exception),  # a trial of its own will report what is wrong
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        names = _names(spec, workload, samples)
    connection.send(names)


def _names(spec: RunSpec, workload: Workload, samples: Batch) -> list[str] | None:
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in workload.build().parameters())
    if weights > MAX_WEIGHTS:
        return None
    torch.set_num_threads(1)  # the parent's other threads are not in a forked process
    network, dtype = build_network(spec.train, workload), weights_dtype(spec.train)
    give_shapes(workload, network, samples, dtype)
    convert_inputs(network, samples, dtype, False)
    means = evaluate(spec, workload, Forward(workload, network), samples, Worker())
    return [f"val/{name}" for name in means]
