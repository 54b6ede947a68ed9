#!/usr/bin/env bash
# torch 2.13.0: the first `with FakeTensorMode()` imports Dynamo, parts of Inductor and of ONNX, and SymPy.
#
# Fake tensors are a cheap way to learn a model's shapes or FLOPs: nothing is computed. But entering
# the mode imports over 800 modules, seconds on a small machine, several times what a small model's
# real step takes. Neither `import torch` nor the import of the class does.
#
# Seen on 2026-11-30 with torch 2.13.0 (CPU), Python 3.11:
#   imported by the class: []
#   imported by entering the mode: ['sympy', 'torch._dynamo', 'torch._inductor', 'torch.onnx']
#   modules: 823
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' numpy
cat >"$folder/look.py" <<'PYTHON'
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HEAVY = ("sympy", "torch._dynamo", "torch._inductor", "torch.onnx")
before = set(sys.modules)
print("imported by the class:", [name for name in HEAVY if name in before])
with FakeTensorMode():
    torch.empty(2)
new = set(sys.modules) - before
print("imported by entering the mode:", [name for name in HEAVY if name in new])
print("modules:", len(new))
PYTHON
seen=$("$folder/venv/bin/python" "$folder/look.py")
echo "$seen"
grep -qx "imported by the class: \[\]" <<<"$seen"
grep -qx "imported by entering the mode: \['sympy', 'torch._dynamo', 'torch._inductor', 'torch.onnx'\]" <<<"$seen"
[ "$(sed -n 's/^modules: //p' <<<"$seen")" -gt 700 ]
