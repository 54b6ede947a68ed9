"""What a training run is: every field of the file, with its unit and its default."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from cluster.base.config import ModelT, Spec, did_you_mean, read_yaml, validate
from cluster.base.errors import SpecError
from cluster.cost.budget import BudgetSpec
from cluster.cost.node_rates import CostSpec

if TYPE_CHECKING:
    from trainers.workload import Workload

SpecT = TypeVar("SpecT", bound="RunSpec")

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class ScheduleSpec(Spec):
    """The learning rate over the steps of the run, as a share of `optimizer.lr`."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls from its peak after the warm-up to `final` at the last step."""
    warmup: Fraction = 0.05
    """Share of all steps in which the rate rises linearly from zero."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rate at the last step, as a share of the peak. Ignored by `constant`."""


class OptimizerSpec(Spec):
    """How gradients become new weights."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The rule; both in PyTorch's fused form."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled for adamw, L2 for sgd. Applied to weights of two or more dimensions only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of adamw's running mean and variance."""
    momentum: Fraction = 0.9
    """Nesterov momentum of sgd; 0 turns it off."""
    schedule: ScheduleSpec = ScheduleSpec()
    """How the learning rate changes over the run."""


class TrainSpec(Spec):
    """How long, on what batches, how exactly."""

    renamed_fields = {"evaluate_every": "evaluate_every_epochs"}

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split. 10 when neither `epochs` nor `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of `epochs`."""
    global_batch: PositiveInt = 64
    """Samples per optimizer step, over all workers together."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides the initial weights, the order of samples, augmentation and dropout, the same on
    any number of workers; what else a model draws is the same on the same number of them."""
    micro_batch: PositiveInt | None = None
    """Samples that a worker takes at once; gradients add up to the global batch. All when None."""
    precision: Literal["fp32", "bf16", "fp16", "fp8", "fp64"] = "fp32"
    """bf16 and fp16 compute under autocast with fp32 weights; fp16 scales the loss; fp8 is for
    linear layers, with bf16 for the rest."""
    compile: Literal["off", "default", "max-autotune"] = "off"
    """torch.compile's mode for the model; the first step then takes longer."""
    activation_checkpointing: bool = False
    """Keep the inputs of the model's blocks alone and compute the blocks again in the backward
    pass: the memory of one block in place of all of them, for about a third more computation."""
    channels_last: bool = False
    """Keep the weights of convolutions channels last, which GPUs with tensor cores prefer."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is NaN or infinite does: end the run, or skip the step."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the whole gradient; longer ones are scaled down to it."""
    evaluate_every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between evaluations on the validation split."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 600
    """Seconds without a step after which a worker counts as hung and is started again from the
    last save; three times as long up to the end of a start's first step, which compiles."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSpec":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps exclude each other; give one")
        return self

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the whole run over a training split of `samples` samples."""
        if self.steps is not None:
            return self.steps
        return self.steps_for_epochs(10.0 if self.epochs is None else self.epochs, samples)

    def steps_for_epochs(self, epochs: float, samples: int) -> int:
        """The first step by whose end `epochs` epochs have been seen."""
        return max(1, math.ceil(epochs * samples / self.global_batch - 1e-9))

    def evaluation_steps(self, samples: int) -> set[int]:
        """The steps after which the model is evaluated, of which the last step is one."""
        total = self.total_steps(samples)
        steps = {total}
        count = 1
        while (step := self.steps_for_epochs(count * self.evaluate_every_epochs, samples)) < total:
            steps.add(step)
            count += 1
        return steps


class ScaleSpec(Spec):
    """How many workers, on what, and how the model is spread over them."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of workers, or [min, max] to train on as many as the cluster has."""
    accelerator: str = "auto"
    """auto (a GPU each where the cluster has any), cpu, gpu, or a type such as H100."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp", "tensor"] = "auto"
    """A copy each (ddp), one copy in shards (fsdp), a copy per group in shards (hsdp), or layers
    split within groups and sharded across them (tensor); auto decides by the model's memory."""
    group: PositiveInt | None = None
    """Workers in a group of hsdp or tensor; for hsdp those of one machine when not given."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray reserves for each worker."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often lost workers are replaced before the run fails. Preemptions don't count."""

    @field_validator("workers")
    @classmethod
    def _in_order(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError("must be [min, max] with min <= max")
        return workers

    @model_validator(mode="after")
    def _groups(self) -> "ScaleSpec":
        if self.group is not None and self.parallel not in ("hsdp", "tensor"):
            raise ValueError(f"group: means nothing with parallel {self.parallel}")
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
        """Into how many shares a global batch is cut; None when workers come and go."""
        if not isinstance(self.workers, int):
            return None
        return self.workers // (self.group or 1) if self.parallel == "tensor" else self.workers


class CheckpointSpec(Spec):
    """When the state of the run is saved, where, and which of the saves are kept."""

    every_steps: PositiveInt | Literal["auto"] = "auto"
    """Steps between saves; the last step is always saved. auto weighs what a save costs, which is
    measured, against the work that a failure would lose."""
    failure_every_hours: Annotated[float, Field(gt=0)] = 24.0
    """Expected time between failures of one worker, for auto. Spot machines: a few hours."""
    keep: PositiveInt = 2
    """How many of the newest saves stay."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """How many of the best saves by `metric` stay too; each evaluation is then saved."""
    metric: str = "val/loss"
    """The metric of evaluation by which saves are best."""
    mode: Literal["min", "max"] = "min"
    """Whether a small or a large `metric` is good."""
    uri: str | None = None
    """Where saves are kept instead of the run's folder, such as s3://bucket/path; a URI that
    pyarrow's file systems know."""


class TrackingSpec(Spec):
    """Where MLflow is, and what is sent there."""

    uri: str | None = None
    """MLflow tracking URI; MLFLOW_TRACKING_URI when not given, else sqlite:///mlflow.db here."""
    experiment: str = "heliostat"
    """Name of the MLflow experiment; made when it does not exist."""
    every_steps: PositiveInt = 10
    """Steps between training metrics. Each is the mean over the steps since the one before."""


class RunSpec(Spec):
    """One training run, and with `sweep` a family of them."""

    workload: str
    """What to train: a shipped workload by name, or your own as module:Class."""
    storage: str = "runs"
    """Folder for data sets, checkpoints and results; shared by all nodes of a cluster."""
    datasets: str | None = None
    """Where data sets are kept once they are made, instead of in `storage`: a URI that pyarrow's
    file systems know, such as s3://bucket/path. Each machine fetches one once."""
    data: dict[str, Any] = {}
    """What the workload's data set is made from; the fields are the workload's own."""
    model: dict[str, Any] = {}
    """The model's hyperparameters; the fields are the workload's own."""
    optimizer: OptimizerSpec = OptimizerSpec()
    train: TrainSpec = TrainSpec()
    scale: ScaleSpec = ScaleSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    budget: BudgetSpec = BudgetSpec()
    cost: CostSpec = CostSpec()
    sweep: dict[str, Any] | None = None
    """What `heliostat sweep` varies."""

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
                f"train.global_batch {batch} gives some of scale.workers "
                f"{self.scale.max_workers} no sample"
            )
        return self


SPECS_FOLDER = Path(__file__).parent / "specs"


def find_spec(name: str) -> tuple[str, dict[str, Any]]:
    """The short name and the plain data of a spec file, a shipped spec or a `module:Class`."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path.stem, read_yaml(path)
    if ":" in name:
        return name.partition(":")[2].lower(), {"workload": name}
    shipped = {file.stem: file for file in SPECS_FOLDER.glob("*.yaml")}
    if name not in shipped:
        hint = did_you_mean(name, shipped)
        raise SpecError(f"no spec {name!r}: neither a file, nor module:Class, nor shipped{hint}")
    return name, read_yaml(shipped[name])


def resolve(data: Mapping[str, Any], spec_type: type[SpecT]) -> tuple[SpecT, "Workload"]:
    """Plain data as a checked spec with all defaults filled in, and the workload it describes."""
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
    return spec.model_copy(update=sections), workload(own_data, own_model)
