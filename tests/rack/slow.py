"""Handwritten digits, slowly: a step takes a moment until the file NOTES/gone is there.

Which sample begins each part of a step is written down with the host that trained it.
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
