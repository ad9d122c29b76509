#!/usr/bin/env bash
# The same command on every node: NODES=4 HEAD=node0 configs/launch/several_nodes.sh configs/qwen3-8b-base.yaml ...
# NODES: how many; HEAD: the host name of one of them, the same everywhere; PORT: free on it. run.root and the data must
# be on a file system that all nodes see.
set -euo pipefail
: "${NODES:?how many nodes}" "${HEAD:?host name of the first node}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --rdzv-backend c10d --rdzv-id "${RUN_ID:-eepo}" \
  --rdzv-endpoint "$HEAD:${PORT:-29500}" -m eepo_fast.cli train "$@"
