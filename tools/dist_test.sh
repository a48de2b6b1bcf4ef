#!/usr/bin/env bash
# Test on several GPUs, of one machine or more: tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# On each of several machines, with its own NODE_RANK: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,3s/^# //p' "$0" >&2
  exit 2
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$3" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${PORT:-29500}" \
  "$(dirname "${BASH_SOURCE[0]}")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
