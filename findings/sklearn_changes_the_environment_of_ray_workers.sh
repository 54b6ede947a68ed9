#!/usr/bin/env bash
# scikit-learn 1.9.1 and Ray 2.60.0: an import in the driver changes all workers' OpenMP runtime.
#
# `import sklearn` sets KMP_DUPLICATE_LIB_OK and KMP_INIT_AT_FORK in `os.environ` of the importing
# process. `ray.init()` starts Ray with the driver's environment, so whether the workers have these
# variables, which Intel's OpenMP reads when it is loaded, depends on which import came first.
#
# Seen on 2026-11-30 with scikit-learn 1.9.1, ray 2.60.0, Python 3.11:
#   ray.init first: []
#   sklearn first: ['KMP_DUPLICATE_LIB_OK=True', 'KMP_INIT_AT_FORK=FALSE']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'ray==2.60.0' 'scikit-learn==1.9.1'
cat >"$folder/look.py" <<'PYTHON'
import os
import sys

if sys.argv[1] == "sklearn":
    import sklearn
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
import sklearn


@ray.remote
def variables():
    return sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("KMP_"))


print(ray.get(variables.remote()))
PYTHON
cd "$folder"
first=$(env -u KMP_DUPLICATE_LIB_OK -u KMP_INIT_AT_FORK venv/bin/python look.py ray 2>/dev/null)
second=$(env -u KMP_DUPLICATE_LIB_OK -u KMP_INIT_AT_FORK venv/bin/python look.py sklearn 2>/dev/null)
echo "ray.init first: $first"
echo "sklearn first: $second"
[ "$first" = "[]" ]
[[ "$second" == *KMP_DUPLICATE_LIB_OK* && "$second" == *KMP_INIT_AT_FORK* ]]
