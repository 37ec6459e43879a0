#!/usr/bin/env bash
# `megatron-gkd train` on all GPUs of one machine, restarted after a failure, from its newest checkpoint.
#
#   bash launch/train_single_node.sh --model path/to/student --teacher_model path/to/teacher \
#       --dataset train.jsonl --save runs/mine
#   NPROC_PER_NODE=2 bash launch/train_single_node.sh --config run.yaml --device cpu       # two processes on a CPU
#   bash launch/train_single_node.sh --config run.yaml --dry-run   # print the command, check all, start nothing
#
# Flags go to `megatron-gkd train` (docs/configuration.md). The same command, given again after an interruption, resumes
# the run in --save; --auto_resume false begins a new one, and refuses a --save that holds another.
#
# Hardware: GPUs that hold student, optimizer and teacher in the layout that the flags give; or a CPU, for tiny models.
# Time:     the run's. A restart costs loading, and the steps since the last checkpoint (--save_steps).
# Expect:   a live line of the first rank (step, loss, tokens/s, time left); exit code 0 when the run has ended. Any
#           other is that of the rank that ended first, after the last restart (2: an error, 75: stopped, with a
#           checkpoint); the last line says why.
#
# Environment:
#   NPROC_PER_NODE    ranks (default: one per visible GPU, else 1)
#   MAX_RESTARTS      times that all ranks are started again after one has failed (default: 3)
#   AUTO_RESUME       0 leaves out --auto_resume true (default: 1)
#   GKD_VENV          environment to run in (default: .venv in the repository)
#   OMP_NUM_THREADS   threads per rank (default: 1)
#   CUDA_DEVICE_MAX_CONNECTIONS    (default: 1, which megatron-core wants for tensor and sequence parallelism:
#                     communication is then issued in the order of the program)
#   PYTORCH_CUDA_ALLOC_CONF, NCCL_DEBUG and all others are passed through; those of several nodes: train_multi_node.sh
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

take_flags "$@"
ranks_of_this_node
max_restarts=${MAX_RESTARTS:-3}
zero_or_positive MAX_RESTARTS "$max_restarts"
start_training "$nproc" --standalone --nproc-per-node "$nproc" --max-restarts "$max_restarts"
