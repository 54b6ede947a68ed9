#!/usr/bin/env bash
# torch 2.13.0: BatchNorm in training mode changes its running statistics without raising their version.
#
# Each tensor has a counter of in-place writes, `Tensor._version`. Autograd goes by it, and so may any
# code that wants to know which state a forward pass has changed, such as a cache, or a checkpoint of
# activations that must not update statistics twice. `running_mean` and `running_var` are written and
# keep their version; `num_batches_tracked`, in the same module, does not.
#
# Seen on 2026-11-30 with torch 2.13.0 (CPU), Python 3.11:
#   running_mean: changed True, version 0 -> 0
#   running_var: changed True, version 0 -> 0
#   num_batches_tracked: changed True, version 0 -> 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' numpy
cat >"$folder/look.py" <<'PYTHON'
import torch
from torch import nn

norm = nn.BatchNorm1d(3)
before = {name: (buffer.clone(), buffer._version) for name, buffer in norm.named_buffers()}
norm(torch.randn(8, 3) + 5)
for name, buffer in norm.named_buffers():
    value, version = before[name]
    changed = not torch.equal(value, buffer)
    print(f"{name}: changed {changed}, version 0 -> {buffer._version - version}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/look.py")
echo "$seen"
grep -qx "running_mean: changed True, version 0 -> 0" <<<"$seen"
grep -qx "running_var: changed True, version 0 -> 0" <<<"$seen"
grep -qE "^num_batches_tracked: changed True, version 0 -> [1-9]" <<<"$seen"
