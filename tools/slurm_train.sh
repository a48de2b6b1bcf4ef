#!/usr/bin/env bash
# Train as a SLURM job: GPUS=16 GPUS_PER_NODE=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
# CPUS_PER_TASK and SRUN_ARGS (further arguments of srun) may be set, too.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,3s/^# //p' "$0" >&2
  exit 2
fi
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
gpus_per_node=$((gpus < gpus_per_node ? gpus : gpus_per_node))
# shellcheck disable=SC2086  # SRUN_ARGS holds several arguments
exec srun --partition "$1" --job-name "$2" --gres "gpu:$gpus_per_node" \
  --ntasks "$gpus" --ntasks-per-node "$gpus_per_node" --cpus-per-task "${CPUS_PER_TASK:-8}" \
  --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  "${PYTHON:-python}" -u "$(dirname "${BASH_SOURCE[0]}")/train.py" "$3" --launcher slurm "${@:4}"
