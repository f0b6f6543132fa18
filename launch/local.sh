#!/usr/bin/env bash
# The bundled model on this machine, as configs/clusters/local.toml has it, in plain commands: two attention
# workers that hold the KV cache, and the engine with its HTTP server on http://127.0.0.1:8000.
# Ctrl-C ends all three; so does the end of one of them. `python -m lamina_jax.launch local` does the same
# from the file, and also pins, labels the output, and leaves nothing behind when it is killed itself.
#
#   launch/local.sh              the bundled model
#   launch/local.sh FOLDER ...   another model; what follows it goes to serve
set -euo pipefail
set -m  # each process in a group of its own: Ctrl-C is for this script, which ends them in order

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
pids=()

end() {
    trap - EXIT INT TERM
    kill "${pids[@]}" 2>/dev/null || true  # SIGTERM: each lets what it is doing end
    wait || true
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() {
    "$python" -m "$@" &
    pids+=($!)
}

start lamina_jax.attend --listen 127.0.0.1:7101 --devices cpu:0 --memory-fraction 0.2
start lamina_jax.attend --listen 127.0.0.1:7102 --devices cpu:0 --memory-fraction 0.2
start lamina_jax.serve "${@:-bundled}" --port 8000 --attention 127.0.0.1:7101,127.0.0.1:7102 --partition heads

wait -n "${pids[@]}"  # the first that ends; its exit code is this script's
