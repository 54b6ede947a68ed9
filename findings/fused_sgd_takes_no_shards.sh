#!/usr/bin/env bash
# torch 2.13.0: `SGD(fused=True)` cannot train a model of `fully_shard`; `AdamW(fused=True)` can.
#
# Both are elementwise. Only the kernels of Adam have a rule for DTensors.
#
# Seen on 2026-11-30 with torch 2.13.0 (CPU, gloo, two processes), Python 3.11:
#   AdamW: a step
#   SGD: NotImplementedError: Operator aten._fused_sgd_.default does not have a sharding strategy registered.
#   SGD with momentum: NotImplementedError: Operator aten._fused_sgd_.default does not have a sharding strategy registered.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' numpy
cat >"$folder/look.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def attempt(optimizer):
    try:
        optimizer.step()
    except NotImplementedError as error:
        return f"NotImplementedError: {error}".splitlines()[0]
    return "a step"


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    layer = nn.Linear(4, 4)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    layer(torch.ones(2, 4)).sum().backward()
    weights = list(layer.parameters())
    optimizers = {
        "AdamW": torch.optim.AdamW(weights, fused=True),
        "SGD": torch.optim.SGD(weights, lr=0.1, fused=True),
        "SGD with momentum": torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True),
    }
    for name, optimizer in optimizers.items():
        told = attempt(optimizer)
        if rank == 0:
            print(f"{name}: {told}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), 2)
PYTHON
seen=$("$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null)
echo "$seen"
grep -qx "AdamW: a step" <<<"$seen"
[ "$(grep -c "^SGD.*: NotImplementedError: Operator aten._fused_sgd_.default" <<<"$seen")" = 2 ]
