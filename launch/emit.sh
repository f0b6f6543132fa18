#!/usr/bin/env bash
# Writes anew what lies in launch/slurm, launch/kubernetes and launch/tpu, after a change of configs/clusters or of
# what writes it. A test keeps them equal.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

emit() {  # place, cluster file's name
    "$python" -m lamina_jax.launch emit --for "$1" --cluster "configs/clusters/$2.toml" --output "launch/$1"
}

emit slurm h100-h20
emit kubernetes h100-h20
emit kubernetes tpu
emit tpu tpu
emit tpu tpu-split
