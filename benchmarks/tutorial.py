"""The digits network, trained for one step as in Ray's guide to Ray Train with PyTorch.

    python benchmarks/tutorial.py WORKERS DIGITS.npz STAMP

The guide is https://docs.ray.io/en/latest/train/getting-started-pytorch.html. The Unix time after
the first optimizer step is written to STAMP, in seconds.
"""

import sys
import time
from pathlib import Path

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch.nn import CrossEntropyLoss
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset


def train_func(config: dict[str, str]) -> None:
    from trainers.workloads.vision.workload import ResNet, Vision

    model = ray.train.torch.prepare_model(ResNet(1, 10, Vision.Model(width=16)))
    criterion, optimizer = CrossEntropyLoss(), AdamW(model.parameters(), lr=8e-3)
    digits = np.load(config["digits"])
    data = TensorDataset(*(torch.from_numpy(digits[name]) for name in ("image", "label")))
    batch_size = 64 // ray.train.get_context().get_world_size()
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    for images, labels in loader:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ray.train.get_context().get_world_rank() == 0:
            Path(config["stamp"]).write_text(str(time.time()))
        break


if __name__ == "__main__":
    workers, digits, stamp = sys.argv[1:]
    trainer = ray.train.torch.TorchTrainer(
        train_func,
        train_loop_config={"digits": digits, "stamp": stamp},
        scaling_config=ray.train.ScalingConfig(num_workers=int(workers)),
    )
    trainer.fit()
