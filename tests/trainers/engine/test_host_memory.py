"""What `trainers.engine.host_memory` promises: later steps find the memory of earlier ones."""

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys
import numpy as np  # takes its memory from malloc, too, and is imported in a tenth of the time
from trainers.engine.host_memory import keep_freed_memory
ctypes.CDLL(None).mallopt(-1, 0)  # glibc returns all that it can, not only where chance has it so
if sys.argv[1] == "keep":
    keep_freed_memory()

def step():  # 16 MB in tensors of 1 MB, all alive together, as the activations of a model
    held = [np.ones(2**18, np.float32) for _ in range(16)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def faults_per_step(mode: str, **variables: str) -> float:
    run = subprocess.run(
        [sys.executable, "-c", STEPS, mode],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc's")
class TestKeepFreedMemory:
    def test_steps_after_the_first_ones_touch_no_new_pages(self) -> None:
        # A step touches 4096 pages.
        assert faults_per_step("default") > 1000
        assert faults_per_step("keep") < 50

    def test_what_the_user_has_set_stays(self) -> None:
        assert faults_per_step("keep", MALLOC_TRIM_THRESHOLD_="0") > 1000
