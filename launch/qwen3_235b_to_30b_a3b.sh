#!/usr/bin/env bash
# Qwen3-235B-A22B teaches Qwen3-30B-A3B, both mixtures of 128 experts: TP 8 x EP 8 x PP 2, and TP 2 x EP 8.
#
#   export TEACHER=/models/Qwen3-235B-A22B STUDENT=/models/Qwen3-30B-A3B
#   export DATASET=train.jsonl SAVE=/shared/runs/qwen3_235b_to_30b_a3b
#   # on each of 4 nodes: the student on 2, the teacher on 2
#   NNODES=4 TEACHER_NODES=2 RDZV_ENDPOINT=node0 bash launch/qwen3_235b_to_30b_a3b.sh
#   PLACEMENT=colocate bash launch/qwen3_235b_to_30b_a3b.sh   # two nodes: both on the same GPUs, in turn
#   PLACEMENT=colocate bash launch/qwen3_235b_to_30b_a3b.sh --dry-run   # print the command, check all, start nothing
#
# Further flags go to `megatron-gkd train` and override those here (except --dataset, which is DATASET's). The teacher
# sends its last hidden states, and the student's ranks apply its head, in the fused loss over the full vocabulary.
#
# THIS HAS NOT BEEN RUN ON THE HARDWARE THAT IT IS FOR. The layouts and code paths are tested on tiny models on CPU
# ranks; the memory is rehearsed without a GPU (docs/recipes.md). Start with --train_iters 5 and look at it.
#
# Hardware: nodes of 8 GPUs of 80 GB. bf16 weights of the teacher: 470 GB, 59 GB a GPU of one node. PLACEMENT=separate:
#           TEACHER_NODES an even number (PP 2 x TP 8). PLACEMENT=colocate: 2 nodes or more (on one 79.4 of 80 GB),
#           each of the two models in host memory while the other works.
# Time:     not measured; predicted in docs/recipes.md.
# Expect:   as train_single_node.sh and train_multi_node.sh say.
#
# Environment:
#   TEACHER, STUDENT  Hugging Face directories (required); the vocabulary has to be the same
#   DATASET           training data, one JSONL or Parquet file (required)
#   SAVE              run directory (default: runs/qwen3_235b_to_30b_a3b)
#   PLACEMENT         separate: the teacher on its own nodes, working ahead; colocate: on the student's GPUs
#                     (default: separate)
#   TEACHER_NODES     nodes of the teacher with PLACEMENT=separate (default: 1)
#   NNODES            nodes (default: 1) and, above 1, what train_multi_node.sh asks for
#   NPROC_PER_NODE    GPUs per node (default: 8)
#   BATCH             samples per step, approximately: the nearest multiple of the data parallel size
#                     (default: 128)
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"
student_layout=(
    --tensor_model_parallel_size 2 --sequence_parallel true --use_distributed_optimizer true
    --expert_model_parallel_size 8 --expert_tensor_parallel_size 1 --recompute_granularity full
)
# Two stages wherever the teacher has two nodes: half of its 470 GB on each.
stages=2
[[ ${PLACEMENT:-separate} == separate || ${NNODES:-1} -gt 1 ]] || stages=1
teacher_layout=(
    --teacher_tensor_model_parallel_size 8 --teacher_pipeline_model_parallel_size "$stages"
    --teacher_expert_model_parallel_size 8 --teacher_expert_tensor_parallel_size 1
)
together=(--offload_teacher_model true --offload_model true --offload_optimizer true)
train_pair qwen3_235b_to_30b_a3b 2 "$@"
