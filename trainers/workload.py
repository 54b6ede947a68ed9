"""The contract of a workload: a data set, a model and a loss. It needs neither Ray nor MLflow."""

import ast
import importlib
import random
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import AfterValidator, model_validator
from torch import Tensor, nn

from cluster.base.config import Spec, did_you_mean
from cluster.base.errors import SpecError
from trainers.counter_rng import SampleRandom, random_state_kept

Batch = dict[str, Tensor]
"""Columns of the data set by name, each [B, ...] with the numbers that the column holds.

In the column's own dtype, but floating-point and complex ones at least as wide as the weights. The
model may be called with wider ones, such as float64: it converts its inputs to its weights' dtype.
"""

SHIPPED_WORKLOADS = {
    "dynamics": "trainers.workloads.dynamics.workload:Dynamics",
    "folding": "trainers.workloads.folding.workload:Folding",
    "hedging": "trainers.workloads.hedging.workload:Hedging",
    "language": "trainers.workloads.language.workload:Language",
    "markets": "trainers.workloads.markets.workload:Markets",
    "vision": "trainers.workloads.vision.workload:Vision",
}


def shipped_or_path(shipped: str) -> AfterValidator:
    """Validator of a field that is either `shipped` or a path: makes a relative path absolute.

    The process that reads the path later may have another working folder.
    """
    return AfterValidator(
        lambda source: source if source == shipped else str(Path(source).expanduser().absolute())
    )


class SplitFractions(Spec):
    """Base of a `Data` section with `val_fraction` and `test_fraction`, checked to be below 1."""

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        val, test = (getattr(self, f"{split}_fraction") for split in ("val", "test"))
        if val + test >= 1:
            raise ValueError("val_fraction + test_fraction must be less than 1")
        return self


class Workload(ABC):
    """Base of every workload.

    `Data` and `Model` declare the fields of the spec's sections `data` and `model`. An instance
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
        """Build the splits `train`, `val` and, optionally, `test`, which no trial of a sweep sees.

        A column holds numbers, with the same shape in all rows; `trainers.table` makes such tables
        from numpy arrays. Called once, on one machine; the result is kept as Parquet files. It is
        called again when the code changes, a version of a package that the code imports, a field
        of `data`, or a file or folder that a field of `data` names.
        """

    def made_with(self) -> dict[str, str]:
        """Versions of other things that the data set depends on: {name: version}.

        Another version makes another data set. Packages that a workload's own modules import are
        known without it. The manifest lists all versions.
        """
        return {}

    @abstractmethod
    def build(self) -> nn.Module:
        """Build a new model on the CPU. The caller has seeded the global random state."""

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Augment a training batch, with random numbers only from `random`."""
        return batch

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on a batch; the output goes to `loss` and `metrics`."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The loss of each sample [B]; training minimises the mean."""

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Metrics of each sample, [B] each; evaluation takes the mean over a split.

        Every batch has the same names, of which `loss` is taken.
        """
        return {}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """A split's reported metrics, from the means of `metrics` and of the loss, as `loss`.

        For metrics that are not means over samples: a ratio of means, a root, an exponential. Each
        is one real number of any kind; `loss`, if it is among them, stays as it is.
        """
        return means

    @property
    def evaluation_batch(self) -> int:
        """Samples per evaluation batch of a worker; fewer if a sample's outputs are large."""
        return 512

    def example(self) -> Any | None:
        """A model input with batch size 1, for the signature of the exported model."""
        return None

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The model's repeated blocks: units of FSDP sharding and of activation checkpointing.

        By default, all members of the model's `nn.ModuleList`s.
        """
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def tensor_plan(self, model: nn.Module) -> dict[str, Any]:
        """How layers are split over a tensor-parallel group: {module name: ParallelStyle}.

        The plan for `torch.distributed.tensor.parallel.parallelize_module`; empty if the model
        does not support tensor parallelism.
        """
        return {}

    @property
    def tokens_per_sample(self) -> int | None:
        """Tokens per sample, for throughput in tokens; None for data without tokens."""
        return None


class PartitionedWorkload(Workload):
    """A workload whose data set is built in independent parts.

    `heliostat data` builds them in parallel on a whole cluster, and continues where it was stopped.
    """

    @abstractmethod
    def parts(self) -> Sequence[Any]:
        """Small descriptions of the parts, such as file names or seeds; the same at every call.

        A part should be a few megabytes large: it is the work that is lost with a machine.
        """

    def common(self, parts: Sequence[Any]) -> dict[str, bytes]:
        """Files that all parts need, built before them: {name: content}.

        They are kept with the data set.
        """
        return {}

    @abstractmethod
    def part(self, part: Any, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        """Build one of the `parts`: its rows of each split, the same on every machine.

        A split may be missing. The columns are those of `dataset`.
        """

    def dataset(self) -> dict[str, pa.Table]:
        """Build all parts, one after the other, in the memory of this process."""
        parts = self.parts()
        common = self.common(parts)
        made = [self.part(part, common) for part in parts]
        splits = dict.fromkeys(split for tables in made for split in tables)
        return {
            split: pa.concat_tables(tables[split] for tables in made if split in tables)
            for split in splits
        }


def load_workload(name: str) -> type[Workload]:
    """The class that a spec's `workload` names; SpecError if there is none.

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
        module = _imported(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise SpecError(f"workload: {module_name} cannot be imported: {error}") from error
        raise SpecError(f"workload: no module {module_name!r} in {folder}") from None
    except Exception as error:
        raise SpecError(
            f"workload: {module_name} cannot be imported: {_import_error_location(error)}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        hint = did_you_mean(class_name, {k: v for k, v in vars(module).items() if _is_workload(v)})
        raise SpecError(f"workload: {module_name} has no class {class_name!r}{hint}")
    if not _is_workload(found):
        raise SpecError(f"workload: {target} is not a subclass of trainers.Workload")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise SpecError(f"workload: {target} does not define {', '.join(missing)}")
    workload: type[Workload] = found
    return workload


def _imported(name: str) -> ModuleType:
    """A module, whose random numbers at its import are the same in every process."""
    if name in sys.modules:
        return importlib.import_module(name)
    with random_state_kept():
        torch.default_generator.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return importlib.import_module(name)


def _is_workload(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Workload) and found is not Workload


def _import_error_location(error: Exception) -> str:
    """The error of an import, and the line of the user's code that it comes from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())]
    frame = (own or frames)[-1]
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{reason} ({frame.filename}:{frame.lineno})"


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights, and so of its floating-point inputs; never a complex one.

    PyTorch's default for a model without weights.
    """
    kinds = (weight.dtype for weight in model.parameters())
    found = next((kind for kind in kinds if kind.is_floating_point or kind.is_complex), None)
    return found.to_real() if found is not None else torch.get_default_dtype()


_parsing = threading.Lock()


def parse_source(path: Path) -> ast.Module:
    """A Python file as a syntax tree; raises SyntaxError.

    One at a time: CPython 3.11.7 counts the recursion of its parser for all threads together, and
    raises SystemError where two of them parse (github.com/python/cpython/issues/106905).
    """
    with _parsing:
        return ast.parse(path.read_bytes())


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """The absolute names of what a module of `package` imports, at its top or in a function.

    Of `from a import b` these are `a` and `a.b`, which may be a module or not.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
