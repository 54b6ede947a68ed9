#!/usr/bin/env bash
# torch 2.13.0: `fully_shard` drops what was registered on, and what is written into, a weight.
#
# FSDP2 makes new parameters. A hook that `weight.register_hook` had put on the old one is never
# called: no error, no warning, another gradient. And what a forward pass writes into a gathered
# weight is lost when the weight is freed: `nn.Embedding(max_norm=1)` looks up rows of norm 1, but
# the rows that are stored, trained and saved keep their old norm. (With `DistributedDataParallel`,
# both work.)
#
# Seen on 2026-11-30 with torch 2.13.0 (CPU, gloo, two processes), Python 3.11:
#   gradient under a hook that returns zeros: 2.0
#   norm of the rows, looked up: 1.0, stored afterwards: 20.0
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


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.register_hook(torch.zeros_like)
    fully_shard(layer, mesh=mesh)
    layer(torch.ones(2, 4)).sum().backward()
    gradient = layer.weight.grad.full_tensor().abs().max().item()

    table = nn.Embedding(4, 4, max_norm=1.0)
    with torch.no_grad():
        table.weight.fill_(10.0)
    fully_shard(table, mesh=mesh)
    found = table(torch.arange(4)).norm(dim=1).max().item()
    table.reshard()
    stored = table.weight.full_tensor().norm(dim=1).max().item()
    if rank == 0:
        print(f"gradient under a hook that returns zeros: {gradient}")
        print(f"norm of the rows, looked up: {found:.1f}, stored afterwards: {stored:.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), 2)
PYTHON
seen=$("$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null)
echo "$seen"
grep -qx "gradient under a hook that returns zeros: 2.0" <<<"$seen"
grep -qx "norm of the rows, looked up: 1.0, stored afterwards: 20.0" <<<"$seen"
