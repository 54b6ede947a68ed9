#!/usr/bin/env bash
# Ray Train 2.60.0: a run of fixed size leaves a detached actor in the cluster.
#
# `TorchTrainer.fit()` with `num_workers=1` starts the actor `AutoscalingCoordinator`, in a namespace
# of the same name and with `lifetime="detached"`, although nothing scales. When the driver has
# ended, the actor and its process stay for as long as the cluster does; no later run ends it.
#
# Seen on 2026-11-30 with ray 2.60.0, torch 2.13.0, Python 3.11:
#   before: []
#   after the driver: [{'name': 'AutoscalingCoordinator', 'namespace': 'AutoscalingCoordinator'}]
set -euo pipefail
folder=$(mktemp -d)
cluster=
trap '[ -z "$cluster" ] || kill -- "-$cluster" || true; sleep 2; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray[train]==2.60.0' 'torch==2.13.0'
cat >"$folder/driver.py" <<'PYTHON'
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ray.init(address="auto", log_to_driver=False)
TorchTrainer(
    lambda: None,
    scaling_config=ScalingConfig(num_workers=1),
    run_config=RunConfig(storage_path=__file__ + ".results"),
).fit()
PYTHON
cat >"$folder/look.py" <<'PYTHON'
import ray

ray.init(address="auto", log_to_driver=False)
print(ray.util.list_named_actors(all_namespaces=True))
PYTHON
cd "$folder"
export RAY_AUTH_MODE=disabled
setsid venv/bin/ray start --head --block --num-cpus=2 --disable-usage-stats >/dev/null 2>&1 &
cluster=$!
until before=$(venv/bin/python look.py 2>/dev/null); do sleep 1; done
venv/bin/python driver.py >/dev/null 2>&1
sleep 15
after=$(venv/bin/python look.py 2>/dev/null)
echo "before: $before"
echo "after the driver: $after"
[ "$before" = "[]" ]
[[ "$after" == *"'name': 'AutoscalingCoordinator'"* ]]
