"""The digits network, trained as in Ray's guide to saving and loading checkpoints.

The guide is https://docs.ray.io/en/latest/train/user-guides/checkpoints.html: a checkpoint is
reported at the end of each epoch, and a restarted worker continues from the latest one.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def train(
    begin_step: Callable[[int], None], storage: Path, *, workers: int, steps: int, batch: int
) -> None:
    """Train for `steps` of `batch` samples; `begin_step` is called with the number of each step."""
    import guide
    from ray import cloudpickle
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # So Ray's controller and workers need not have this file.
    cloudpickle.register_pickle_by_value(guide)
    TorchTrainer(
        _worker,
        train_loop_config={"begin_step": begin_step, "steps": steps, "batch": batch},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            storage_path=str(storage), failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.torch import prepare_data_loader, prepare_model
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    from trainers.workloads.vision.workload import ResNet, Vision

    bunch, context = load_digits(), ray.train.get_context()
    images = torch.from_numpy(bunch.images[:1437, None]).float()
    data = TensorDataset(images, torch.from_numpy(bunch.target[:1437]))
    batch_size = config["batch"] // context.get_world_size()
    loader = prepare_data_loader(DataLoader(data, batch_size=batch_size, shuffle=True))
    model = prepare_model(ResNet(1, 10, Vision.Model(width=16)))
    bare = getattr(model, "module", model)  # with several workers, the model is wrapped in DDP
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    epoch, step = 0, 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        bare.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, step = state["epoch"], state["step"]
    while step < config["steps"]:
        if context.get_world_size() > 1:
            loader.sampler.set_epoch(epoch)
        for inputs, labels in loader:
            config["begin_step"](step)
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        epoch += 1
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if context.get_world_rank() == 0:
                state = {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "epoch": epoch, "step": step}, Path(folder) / "state.pt")
                saved = Checkpoint.from_directory(folder)
            ray.train.report({"loss": loss.item()}, checkpoint=saved)
