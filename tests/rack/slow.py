"""Handwritten digits, slowly: each step takes 0.5 s longer until the file NOTES/gone exists.

The first sample of each micro-batch is recorded with the host that trained it.
"""

import socket
import time
from pathlib import Path

from trainers.workloads.vision.workload import Vision


class Slow(Vision):
    class Data(Vision.Data):
        notes: str

    def augment(self, batch, random):
        folder = Path(self.data.notes)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "steps").open("a") as file:
            file.write(f"{int(random.positions[0])} {socket.gethostname()}\n")
        if not (folder / "gone").exists():
            time.sleep(0.5)
        return super().augment(batch, random)
