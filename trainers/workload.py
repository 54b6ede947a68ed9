"""What a user writes: a data set, a model, a loss. Nothing in it knows Ray, MLflow or devices."""

import importlib
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import torch
from pydantic import AfterValidator, model_validator
from torch import Tensor, nn

from cluster.base.config import Spec, did_you_mean
from cluster.base.errors import SpecError
from trainers.counter_rng import SampleRandom

Batch = dict[str, Tensor]
"""Columns of the data set, each [B, ...] in the column's own dtype."""

SHIPPED_WORKLOADS = {
    "dynamics": "trainers.workloads.dynamics.workload:Dynamics",
    "folding": "trainers.workloads.folding.workload:Folding",
    "hedging": "trainers.workloads.hedging.workload:Hedging",
    "language": "trainers.workloads.language.workload:Language",
    "markets": "trainers.workloads.markets.workload:Markets",
    "vision": "trainers.workloads.vision.workload:Vision",
}


def shipped_or_path(shipped: str) -> AfterValidator:
    """For a field that names the `shipped` data, or a file or folder: a relative one's whole path.

    The working folder of whoever reads it later may be another one.
    """
    return AfterValidator(
        lambda source: source if source == shipped else str(Path(source).expanduser().absolute())
    )


class SplitFractions(Spec):
    """Base of a `Data` section with `val_fraction` and `test_fraction`, which leave some."""

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        val, test = (getattr(self, f"{split}_fraction") for split in ("val", "test"))
        if val + test >= 1:
            raise ValueError("val_fraction + test_fraction must be less than 1")
        return self


class Workload(ABC):
    """Base of every workload.

    `Data` and `Model` are the fields of the spec's `data` and `model` sections; an instance
    holds their checked values as `self.data` and `self.model`.
    """

    class Data(Spec):
        """Fields of the spec's section `data`."""

    class Model(Spec):
        """Fields of the spec's section `model`."""

    def __init__(self, data: Any, model: Any) -> None:
        self.data = data
        self.model = model

    @abstractmethod
    def dataset(self) -> dict[str, pa.Table]:
        """The splits `train` and `val`, and `test` where no trial may look.

        Columns hold numbers of one shape for all rows; `trainers.data.dataset.table` makes such a table
        from numpy arrays. Called once on one machine; the result is kept as Parquet files.
        """

    def made_with(self) -> dict[str, str]:
        """Versions of what the data set depends on besides code, fields and files: {name: version}.

        Another version is another data set. The manifest has them.
        """
        return {}

    @abstractmethod
    def build(self) -> nn.Module:
        """A fresh model on the CPU. The global random state has been seeded by the caller."""

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Change a training batch at random, drawing from `random` alone."""
        return batch

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What the model says about a batch."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """What training minimises the mean of, for each sample: [B]."""

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """What evaluation takes the mean of over a split, for each sample: [B] each."""
        return {}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """A split's metrics, from the means over it of the loss, as `loss`, and of the metrics.

        For metrics that are no mean over samples: a ratio of means, a root, an exponential.
        """
        return means

    @property
    def evaluation_batch(self) -> int:
        """Samples that a worker evaluates at once; fewer where a sample's outputs are large."""
        return 512

    def example(self) -> Any | None:
        """An input of the model as a batch of one, for the exported model's signature."""
        return None

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated parts of the model, which are sharded and recomputed one by one.

        All members of the model's `nn.ModuleList`s when not overridden.
        """
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def tensor_plan(self, model: nn.Module) -> dict[str, Any]:
        """How layers are split over a tensor-parallel group: {module name: ParallelStyle}.

        As `torch.distributed.tensor.parallel.parallelize_module` takes it; empty when the
        model cannot be split.
        """
        return {}

    @property
    def tokens_per_sample(self) -> int | None:
        """Tokens that one sample holds, for a rate in tokens; None where there are none."""
        return None


class PartitionedWorkload(Workload):
    """A workload whose data set is made in parts that need not know of each other.

    `heliostat data` makes them in parallel on all of a cluster, and goes on where it stopped.
    """

    @abstractmethod
    def parts(self) -> Sequence[Any]:
        """What the parts are made from, such as names of files, or seeds; small, always the same.

        A part is best some megabytes large: it is what is lost when its machine is.
        """

    def common(self, parts: Sequence[Any]) -> dict[str, bytes]:
        """What all parts need and is made before them, as files: {name: content}.

        They are kept with the data set.
        """
        return {}

    @abstractmethod
    def part(self, part: Any, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        """The rows of each split that one of the parts has, the same on whatever machine.

        A split may be missing. Columns are those of `dataset`.
        """

    def dataset(self) -> dict[str, pa.Table]:
        """All parts, one after the other, in the memory of this process."""
        parts = self.parts()
        common = self.common(parts)
        made = [self.part(part, common) for part in parts]
        splits = dict.fromkeys(split for tables in made for split in tables)
        return {
            split: pa.concat_tables(tables[split] for tables in made if split in tables)
            for split in splits
        }


def load_workload(name: str) -> type[Workload]:
    """The class that a spec's `workload` names; SpecError when there is none.

    `module:Class` is looked up in the working folder first, as Python does for a script.
    """
    target = SHIPPED_WORKLOADS.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise SpecError(f"workload: no workload {name!r}" + did_you_mean(name, SHIPPED_WORKLOADS))
    folder = str(Path.cwd())
    if name not in SHIPPED_WORKLOADS and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise SpecError(f"workload: {module_name} does not import: {error}") from error
        raise SpecError(f"workload: no module {module_name!r} in {folder}") from None
    except Exception as error:
        raise SpecError(
            f"workload: {module_name} does not import: {_import_error_location(error)}"
        ) from error
    found = getattr(module, class_name, None)
    workloads = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Workload) and value is not Workload
    }
    if found is None:
        hint = did_you_mean(class_name, workloads)
        raise SpecError(f"workload: {module_name} has no class {class_name!r}{hint}")
    if class_name not in workloads:
        raise SpecError(f"workload: {target} is not a subclass of trainers.Workload")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise SpecError(f"workload: {target} does not define {', '.join(missing)}")
    workload: type[Workload] = found
    return workload


def _import_error_location(error: Exception) -> str:
    """What went wrong on import, and the line of the user's own code that it comes from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())]
    frame = (own or frames)[-1]
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{reason} ({frame.filename}:{frame.lineno})"


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights, which its floating-point inputs must have."""
    return next(model.parameters()).dtype
