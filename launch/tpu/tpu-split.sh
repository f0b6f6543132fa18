#!/usr/bin/env bash
# Written by `python -m lamina_jax.launch emit --for tpu --cluster configs/clusters/tpu-split.toml`.
#
#   tpu-split.sh start    on the hosts of the slices, as units of systemd, which restarts what fails
#   tpu-split.sh stop     each lets what it is doing end
#   tpu-split.sh logs     of all hosts, as they come
set -euo pipefail

addresses() {  # of a slice's hosts, in order
    gcloud compute tpus tpu-vm describe "$1" --zone=us-west4-a --flatten=networkEndpoints \
        --format='value(networkEndpoints.ipAddress)'
}
everywhere() {  # slice, command: on all of its hosts
    gcloud compute tpus tpu-vm ssh "$1" --zone=us-west4-a --worker=all --command="$2"
}

case "${1:-}" in
stop) command='sudo systemctl stop "lamina-*"' ;;
logs) command='journalctl --follow --unit="lamina-*"' ;;
start) command= ;;
*) echo "$0 start | stop | logs" >&2; exit 2 ;;
esac
if [ -n "$command" ]; then
    set -m  # each slice's in a process group, which ends with this script: Ctrl-C ends the logs
    pids=() code=0
    trap 'kill -- "${pids[@]/#/-}" 2>/dev/null || true' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    for slice in lamina-v5e; do
        everywhere "$slice" "$command" < /dev/null &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    exit "$code"
fi
found=$(addresses lamina-v5e)
mapfile -t all <<< "$found"
compute=("${all[0]}" "${all[1]}")
found=$(addresses lamina-v5e)
mapfile -t all <<< "$found"
memory=("${all[2]}" "${all[3]}")

everywhere lamina-v5e "$(declare -p compute memory)
$(cat <<'SCRIPT'
set -eu
unit() {  # name, command
    sudo systemd-run --unit="lamina-$1" --collect --uid="$(id -un)" --working-directory=/opt/lamina \
        --property=Restart=on-failure --property=RestartSec=5 \
        --property=TimeoutStopSec=40 "${@:2}"
}
here=$(curl -sf -H 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
case "$here" in
0)
    unit engine env PYTHONUNBUFFERED=1 TPU_VISIBLE_CHIPS=0,1,2,3 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_PROCESS_BOUNDS=2,1,1 "TPU_PROCESS_ADDRESSES=${compute[0]}:8476,${compute[1]}:8476" TPU_PROCESS_PORT=8476 CLOUD_TPU_TASK_ID=0 /opt/lamina/bin/python -m lamina_jax.serve meta-llama/Llama-3.1-8B-Instruct --max-model-len 8192 --max-num-seqs 64 --compute-devices tpu:0-3 --attention "${memory[0]}:7101,${memory[1]}:7101" --coordinator "${compute[0]}:7100" --num-hosts 2 --host-id 0 --insecure
    ;;
1)
    unit follower-1 env PYTHONUNBUFFERED=1 TPU_VISIBLE_CHIPS=0,1,2,3 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_PROCESS_BOUNDS=2,1,1 "TPU_PROCESS_ADDRESSES=${compute[0]}:8476,${compute[1]}:8476" TPU_PROCESS_PORT=8476 CLOUD_TPU_TASK_ID=1 /opt/lamina/bin/python -m lamina_jax.serve meta-llama/Llama-3.1-8B-Instruct --max-model-len 8192 --max-num-seqs 64 --compute-devices tpu:0-3 --attention "${memory[0]}:7101,${memory[1]}:7101" --coordinator "${compute[0]}:7100" --num-hosts 2 --host-id 1 --insecure
    ;;
2)
    unit worker-0 env PYTHONUNBUFFERED=1 TPU_VISIBLE_CHIPS=0,1,2,3 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_PROCESS_BOUNDS=1,1,1 TPU_PROCESS_ADDRESSES=localhost:8476 TPU_PROCESS_PORT=8476 CLOUD_TPU_TASK_ID=0 /opt/lamina/bin/python -m lamina_jax.attend --listen "${memory[0]}:7101" --devices tpu:0-3 --insecure
    ;;
3)
    unit worker-1 env PYTHONUNBUFFERED=1 TPU_VISIBLE_CHIPS=0,1,2,3 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 TPU_PROCESS_BOUNDS=1,1,1 TPU_PROCESS_ADDRESSES=localhost:8476 TPU_PROCESS_PORT=8476 CLOUD_TPU_TASK_ID=0 /opt/lamina/bin/python -m lamina_jax.attend --listen "${memory[1]}:7101" --devices tpu:0-3 --insecure
    ;;
*) echo "host $here of the slice is not used" ;;
esac
SCRIPT
)"
