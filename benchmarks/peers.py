"""A sweep without Heliostat: with Ray Tune, as its users write it, and as trials one by one.

    python benchmarks/peers.py FOLDER tune [--reuse] [--per-device N] [--mlflow URI]
    python benchmarks/peers.py FOLDER turn [--fused] [--compile MODE] [--threads N]

`fused.py` and `many.py` run these, each in a process of its own, and make FOLDER: the sweep, its
trials' specs and the data set. `tune` is a function trainable as in Ray's guide to Tune with
PyTorch (https://docs.ray.io/en/latest/tune/examples/tune-pytorch-cifar.html), without checkpoints;
with --mlflow each trial is logged by Ray's own callback. Where people know a faster way, it is
used: batches are gathered by index from tensors instead of a DataLoader, and nothing waits for the
loss. `turn` does steps of the first trial for a few seconds, without its evaluations.

The last line is JSON. `tune` prints each evaluation as [trial, step, Unix time, metric]. `turn`
prints the number of `steps` that were timed, after compilation, and their `seconds`.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.base.config import read_yaml
from trainers.counter_rng import combine_seeds
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import epoch_permutation
from trainers.data.splits import count_samples, open_split
from trainers.spec import RunSpec, resolve
from tuning.spaces.space import SweepRunSpec

SWEEP, TRIALS = "sweep.yaml", "trials.json"
WARM_UP = 20
"""Number of steps before the timed ones."""
TIMED_S = 5.0


class Training:
    """One trial, written by hand. It follows the spec: weights, order of the samples, loss,
    learning rates and evaluations.

    Covered: AdamW with a cosine schedule after a warm-up, without clipping and augmentation.
    """

    def __init__(
        self, trial: dict[str, Any], dataset: Path, fused: bool = False, mode: str | None = None
    ) -> None:
        """`fused` is AdamW's option, and `mode` is torch.compile's; without it, no compilation."""
        spec, workload = resolve(trial, RunSpec)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._split, self._val = (
            {name: column.to(device) for name, column in open_split(dataset, split).items()}
            for split in ("train", "val")
        )
        samples = len(next(iter(self._split.values())))
        self._batch, self._lr = spec.train.global_batch, spec.optimizer.lr
        self.total = spec.train.total_steps(samples)
        self._warmup = round(spec.optimizer.schedule.warmup * self.total)
        self.epoch_steps = samples / self._batch
        self.evaluations = spec.train.evaluation_steps(samples)
        seed, epochs = spec.train.seed, range(math.ceil(self.total / self.epoch_steps))
        self._order = torch.cat([epoch_permutation(seed, epoch, samples) for epoch in epochs]).to(
            device
        )
        torch.manual_seed(combine_seeds(seed))
        self._workload = workload
        self._model = model = workload.build().to(device)
        groups = by_decay(model, spec.optimizer.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=self._lr, fused=fused or None)

        def mean_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return workload.loss(workload.forward(model, batch), batch).mean()

        self._mean_loss = torch.compile(mean_loss, mode=mode) if mode else mean_loss

    def take(self, step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * self._share_of_peak(step)
        index = self._order[step * self._batch : (step + 1) * self._batch]
        batch = {name: column.index_select(0, index) for name, column in self._split.items()}
        self._mean_loss(batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _share_of_peak(self, step: int) -> float:
        if step < self._warmup:
            return (step + 1) / self._warmup
        progress = (step - self._warmup) / max(1, self.total - 1 - self._warmup)
        return (1 + math.cos(math.pi * progress)) / 2

    def evaluate(self) -> float:
        """The mean loss over the validation split."""
        self._model.eval()
        with torch.inference_mode():
            output = self._workload.forward(self._model, self._val)
            loss = self._workload.loss(output, self._val).mean().item()
        self._model.train()
        return float(loss)


def by_decay(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: biases and norms have no weight decay."""
    weights = list(model.parameters())
    decayed = [weight for weight in weights if weight.ndim > 1]
    others = [weight for weight in weights if weight.ndim == 1]
    return [
        {"params": decayed, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


def train_trial(config: dict[str, Any], trials: list[dict[str, Any]], dataset: Path) -> None:
    """Ray Tune's trainable."""
    from ray import tune

    torch.set_num_threads(1)
    training = Training(trials[config["trial"]], dataset)
    for step in range(training.total):
        training.take(step)
        done = step + 1
        if done in training.evaluations:
            epoch = done / training.epoch_steps
            tune.report({"val/loss": training.evaluate(), "epoch": epoch, "step": done})


def tune_sweep(
    folder: Path, reuse: bool, per_device: int, mlflow_uri: str | None
) -> list[list[float]]:
    """Run the whole sweep, with a trial at a time per core, or `per_device` trials per GPU.

    With `mlflow_uri` each trial is logged by Ray's own callback.
    """
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    from tuning.search.schedulers import build_scheduler

    reports = []

    class Follower(tune.Callback):
        def on_trial_result(self, trial: Any, result: dict[str, Any], **info: Any) -> None:
            metric = result["val/loss"]
            reports.append([trial.config["trial"], result["step"], time.time(), metric])

    spec, workload = resolve(read_yaml(folder / SWEEP), SweepRunSpec)
    trials = json.loads((folder / TRIALS).read_text())
    ray.init(include_dashboard=False)  # no trial needs it, and Heliostat does not start it either
    dataset = prepare_dataset(workload, folder)
    samples = count_samples(dataset, "train")
    epochs = spec.train.total_steps(samples) * spec.train.global_batch / samples
    trainable = tune.with_parameters(train_trial, trials=trials, dataset=dataset)
    gpu = {"gpu": 1 / per_device} if per_device else {}
    callbacks: list[tune.Callback] = [Follower()]
    if mlflow_uri:
        callbacks.append(MLflowLoggerCallback(mlflow_uri, experiment_name="tune"))
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, **gpu}),
        param_space={"trial": tune.grid_search(list(range(len(trials))))},
        tune_config=tune.TuneConfig(
            metric=spec.sweep.metric,
            mode=spec.sweep.mode,
            scheduler=build_scheduler(
                spec.sweep, epochs, evaluate_every_epochs=spec.train.evaluate_every_epochs
            ),
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(storage_path=str(Path.cwd()), callbacks=callbacks, verbose=0),
    ).fit()
    ray.shutdown()
    return reports


def in_turn(folder: Path, fused: bool, mode: str | None) -> dict[str, float]:
    """The steady speed of one process that only does steps."""
    trial = json.loads((folder / TRIALS).read_text())[0]
    _, workload = resolve(trial, RunSpec)
    training = Training(trial, prepare_dataset(workload, folder), fused, mode)
    for step in range(WARM_UP):
        training.take(step)
    _wait()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < TIMED_S:
        training.take((WARM_UP + done) % training.total)
        done += 1
    _wait()
    return {"steps": done, "seconds": time.perf_counter() - start}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("kind", choices=("tune", "turn"))
    options.add_argument("--reuse", action="store_true")
    options.add_argument("--per-device", type=int, default=0)
    options.add_argument("--mlflow", metavar="URI")
    options.add_argument("--fused", action="store_true")
    options.add_argument("--compile", metavar="MODE")
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.kind == "tune":
        print(json.dumps(tune_sweep(args.folder, args.reuse, args.per_device, args.mlflow)))
    else:
        print(json.dumps(in_turn(args.folder, args.fused, args.compile)))


if __name__ == "__main__":
    main()
