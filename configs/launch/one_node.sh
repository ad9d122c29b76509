#!/usr/bin/env bash
# One node, all its GPUs: configs/launch/one_node.sh configs/qwen2.5-3b.yaml [key.sub=value ...]
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m eepo_fast.cli train "$@"
