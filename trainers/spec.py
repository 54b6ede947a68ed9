"""The spec of a training run: every field of the file, with its unit and its default."""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from cluster.base.config import ModelT, Spec, did_you_mean, read_yaml, validate, with_value
from cluster.base.errors import SpecError
from cluster.cost.budget import BudgetSpec
from cluster.cost.node_rates import CostSpec
from trainers.changes import ChangeSpec
from trainers.run_folder import ENVIRONMENT, present_paths

if TYPE_CHECKING:
    from trainers.workload import Workload

SpecT = TypeVar("SpecT", bound="RunSpec")

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class ScheduleSpec(Spec):
    """The learning rate over the steps of the run, as a share of `optimizer.lr`."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate goes from its peak, after the warm-up, to `final` at the last step."""
    warmup: Fraction = 0.05
    """Share of all steps in which the rate rises linearly from zero."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rate at the last step, as a share of the peak. Ignored by `constant`."""


class OptimizerSpec(Spec):
    """The optimizer and its hyperparameters."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer; both are PyTorch's fused implementations."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled for adamw, L2 for sgd. Only for weights with two or more dimensions."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of adamw's running mean and variance."""
    momentum: Fraction = 0.9
    """Nesterov momentum of sgd; 0 for none."""
    schedule: ScheduleSpec = ScheduleSpec()
    """How the learning rate changes over the run."""


class TrainSpec(Spec):
    """The length of the run, its batches, its precision, its evaluations."""

    renamed_fields = {"evaluate_every": "evaluate_every_epochs"}

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split. 10 when neither `epochs` nor `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of `epochs`."""
    global_batch: PositiveInt = 64
    """Samples per optimizer step, summed over all workers."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the initial weights, the order of samples, augmentation and dropout, which are the
    same on any number of workers. Other random numbers of a model depend on that number too."""
    micro_batch: PositiveInt | None = None
    """Samples per forward and backward pass of a worker; gradients are accumulated over a step. By
    default, all of a worker's samples at once."""
    precision: Literal["fp32", "bf16", "fp16", "fp8", "fp64"] = "fp32"
    """bf16 and fp16 run under autocast with fp32 weights, fp16 with loss scaling; fp8 is used for
    linear layers, with bf16 for the rest."""
    compile: Literal["off", "default", "max-autotune"] = "off"
    """torch.compile's mode for the model; the first step includes the compilation."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the model's blocks and recompute the blocks in the backward pass:
    takes the activation memory of one block instead of all, for about a third more computation."""
    channels_last: bool = False
    """Use the channels-last memory format for convolutions, which is faster on tensor cores."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a NaN or infinite loss or gradient: end the run, or skip the step."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest 2-norm of the gradient over all weights; larger gradients are scaled down to it."""
    evaluate_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between evaluations on the validation split."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 600
    """Seconds without a step after which a worker counts as hung and is restarted from the last
    checkpoint; three times as long for the first step after a start, which may compile."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSpec":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps exclude each other; give one")
        return self

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the whole run, for a training split of `samples` samples."""
        if self.steps is not None:
            return self.steps
        return self.steps_for_epochs(10.0 if self.epochs is None else self.epochs, samples)

    def steps_for_epochs(self, epochs: float, samples: int) -> int:
        """The number of steps that cover `epochs` epochs of `samples` samples."""
        return max(1, math.ceil(epochs * samples / self.global_batch - 1e-9))

    def evaluation_steps(self, samples: int) -> set[int]:
        """The steps after which the model is evaluated, including the last step."""
        total = self.total_steps(samples)
        steps = {total}
        count = 1
        while (step := self.steps_for_epochs(count * self.evaluate_every_epochs, samples)) < total:
            steps.add(step)
            count += 1
        return steps


class ScaleSpec(Spec):
    """The number of workers, their devices, and how they share the model."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of workers, or [min, max] to use as many as the cluster has room for."""
    accelerator: str = "auto"
    """auto (one GPU per worker if the cluster has any), cpu, gpu, or a type such as H100."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp", "tensor"] = "auto"
    """ddp: each worker has a copy of the model. fsdp: all workers share one sharded copy. hsdp:
    each group shares one. tensor: layers are split within groups and sharded across them. auto
    chooses ddp, hsdp or fsdp by the model's memory."""
    group: PositiveInt | None = None
    """Workers per group of hsdp or tensor; the default for hsdp is the workers of one machine."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray reserves per worker."""
    threads: PositiveInt | None = None
    """Threads with which a worker computes on a CPU: the last digits of its results depend on
    their number. By default those of OMP_NUM_THREADS, or the worker's share of the machine's cores;
    of a trial, the CPUs of `sweep.resources`."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often the workers are restarted after a failure. Preemptions don't count."""

    @field_validator("workers")
    @classmethod
    def _in_order(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError("must be [min, max] with min <= max")
        return workers

    @model_validator(mode="after")
    def _groups(self) -> "ScaleSpec":
        if self.group is not None and self.parallel not in ("hsdp", "tensor"):
            raise ValueError(f"group: only used with parallel hsdp and tensor, not {self.parallel}")
        if self.parallel != "tensor":
            return self
        if self.group is None:
            raise ValueError("group: tensor needs the number of workers that split a layer")
        if not isinstance(self.workers, int) or self.workers % self.group:
            raise ValueError(f"group: workers must be a multiple of group {self.group}")
        return self

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def data_parallel_size(self) -> int | None:
        """The number of data-parallel shares of a global batch; None if workers come and go."""
        if not isinstance(self.workers, int):
            return None
        return self.workers // (self.group or 1) if self.parallel == "tensor" else self.workers


class CheckpointSpec(Spec):
    """When checkpoints are saved, where, and how many are kept."""

    every_steps: PositiveInt | Literal["auto"] = "auto"
    """Steps between checkpoints; the last step is always saved. auto weighs the measured time of a
    save against the work that a failure would lose."""
    failure_every_hours: Annotated[float, Field(gt=0)] = 24.0
    """Mean time between failures of one worker, for auto. A few hours for spot machines."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Number of best checkpoints by `metric` to keep as well; each evaluation is then saved."""
    metric: str = "val/loss"
    """The evaluation metric that ranks checkpoints."""
    mode: Literal["min", "max"] = "min"
    """Whether a small or a large `metric` is better."""
    uri: str | None = None
    """Where checkpoints are kept instead of the run's folder: a URI of pyarrow's file systems, such
    as s3://bucket/path."""


class TrackingSpec(Spec):
    """The MLflow server, and what is logged to it."""

    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI or, if that is not set either,
    sqlite:///mlflow.db in the working folder."""
    experiment: str = "heliostat"
    """Name of the MLflow experiment; created if it does not exist."""
    every_steps: PositiveInt = 10
    """Steps between training metrics. Each value is the mean over the steps since the last one."""


class SessionSpec(Spec):
    """The processes that stay on this machine for the next command."""

    keep_warm_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds for which Ray, and a process that has imported torch, stay after the last command. 0
    ends them with it."""


class RunSpec(Spec):
    """One training run or, with `sweep`, many."""

    workload: str
    """The workload to train: the name of a shipped one, or your own as module:Class."""
    storage: str = "runs"
    """Folder for data sets, checkpoints and results; all nodes of a cluster must share it."""
    datasets: str | None = None
    """Where data sets are kept instead of in `storage`: a URI of pyarrow's file systems, such as
    s3://bucket/path. Each machine downloads a data set once."""
    data: dict[str, Any] = {}
    """Fields of the workload's `Data`: how its data set is made."""
    model: dict[str, Any] = {}
    """Fields of the workload's `Model`: the model's hyperparameters."""
    optimizer: OptimizerSpec = OptimizerSpec()
    train: TrainSpec = TrainSpec()
    scale: ScaleSpec = ScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    budget: BudgetSpec = BudgetSpec()
    cost: CostSpec = CostSpec()
    session: SessionSpec = SessionSpec()
    sweep: dict[str, Any] | None = None
    """The search of `heliostat sweep`."""
    changes: list[ChangeSpec] = []
    """Fields that change while the run goes on, in the order of their steps. So a trial of pbt is
    trained once more, as `best.yaml` has it."""

    @field_validator("changes")
    @classmethod
    def _check_order(cls, changes: list[ChangeSpec]) -> list[ChangeSpec]:
        if any(later.step <= earlier.step for earlier, later in pairwise(changes)):
            raise ValueError("must be in the order of their steps, each step once")
        return changes

    @model_validator(mode="after")
    def _batch_divides(self) -> "RunSpec":
        shares, batch = self.scale.data_parallel_size, self.train.global_batch
        if shares is not None and batch % shares:
            raise ValueError(
                f"train.global_batch {batch} cannot be shared evenly by scale.workers {shares}"
            )
        micro = self.train.micro_batch
        if micro is not None and shares is not None and batch % (shares * micro):
            raise ValueError(
                f"train.global_batch {batch} is not a multiple of scale.workers {shares} x "
                f"train.micro_batch {micro}"
            )
        if shares is None and self.scale.max_workers > batch:
            raise ValueError(
                f"train.global_batch {batch} is too small for scale.workers "
                f"{self.scale.max_workers}: each worker needs a sample"
            )
        return self


SPECS_FOLDER = Path(__file__).parent / "specs"


def find_spec(name: str) -> tuple[str, dict[str, Any]]:
    """The short name and the plain data of a spec file, a shipped spec or a `module:Class`."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        data = read_yaml(path)
        of_run = (path.parent / ENVIRONMENT).is_file()  # its spec.yaml, or a sweep's best.yaml
        return path.stem, present_paths(data, path.parent) if of_run else data
    if ":" in name:
        return name.partition(":")[2].lower(), {"workload": name}
    shipped = {file.stem: file for file in SPECS_FOLDER.glob("*.yaml")}
    if name not in shipped:
        hint = did_you_mean(name, shipped)
        raise SpecError(
            f"no spec {name!r}: neither a file, nor module:Class, nor a shipped spec{hint}"
        )
    return name, read_yaml(shipped[name])


def resolve(data: Mapping[str, Any], spec_type: type[SpecT]) -> tuple[SpecT, "Workload"]:
    """Check plain data; returns the spec with all defaults, and the workload that it describes."""
    from trainers.workload import load_workload

    name = data.get("workload")
    if not isinstance(name, str):
        raise SpecError(f"workload: must name a workload (got {name!r})")
    workload = load_workload(name)
    mistakes: list[str] = []

    def checked(model: type[ModelT], part: Any, prefix: str = "") -> ModelT | None:
        try:
            return validate(model, part, prefix)
        except SpecError as error:
            mistakes.extend(str(error).splitlines())
            return None

    spec = checked(spec_type, data)
    own_data = checked(workload.Data, data.get("data", {}), "data.")
    own_model = checked(workload.Model, data.get("model", {}), "model.")
    if spec is None or own_data is None or own_model is None:
        raise SpecError("\n".join(dict.fromkeys(mistakes)))
    sections = {"data": own_data.model_dump(), "model": own_model.model_dump()}
    found = spec.model_copy(update=sections), workload(own_data, own_model)
    spec_parts(*found)
    return found


def spec_at(spec: SpecT, workload: "Workload", step: int) -> tuple[SpecT, "Workload"]:
    """The spec and the workload of step `step`, counted from 1."""
    *_, (_, at_step, own_workload) = (p for p in spec_parts(spec, workload) if p[0] < max(1, step))
    return at_step, own_workload


def spec_parts(spec: SpecT, workload: "Workload") -> list[tuple[int, SpecT, "Workload"]]:
    """The parts of a run between its changes: first step, spec and workload of each.

    Raises SpecError for a change to a value that its field does not accept.
    """
    parts = [(0, spec.model_copy(update={"changes": []}), workload)]
    for number, change in enumerate(spec.changes):
        data = parts[-1][1].model_dump(mode="json")
        for path, value in change.set.items():
            data = with_value(data, path, value)
        try:
            parts.append((change.step, *resolve(data, type(spec))))
        except SpecError as error:
            raise SpecError(f"changes.{number}.set: {error}") from None
    return parts
