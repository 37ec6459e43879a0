#!/usr/bin/env bash
# Qwen2.5-72B-Instruct teaches Qwen2.5-7B, each in its own layout: the teacher TP 8, the student TP 2.
#
#   export TEACHER=/models/Qwen2.5-72B-Instruct STUDENT=/models/Qwen2.5-7B-Instruct
#   export DATASET=train.jsonl SAVE=/shared/runs/72b_to_7b
#   # on each of 3 nodes: the student on 2, the teacher on 1
#   NNODES=3 RDZV_ENDPOINT=node0 bash launch/qwen2.5_72b_to_7b.sh
#   PLACEMENT=colocate bash launch/qwen2.5_72b_to_7b.sh   # one node: both on the same 8 GPUs, the teacher offloaded
#   SCRIPT=launch/qwen2.5_72b_to_7b.sh sbatch --nodes=3 launch/slurm.sbatch
#   PLACEMENT=colocate bash launch/qwen2.5_72b_to_7b.sh --dry-run        # print the command, check all, start nothing
#
# Further flags go to `megatron-gkd train` and override those here (except --dataset, which is DATASET's). The teacher
# sends its last hidden states (8,192 numbers per token instead of 152,064 logits), and the student's ranks apply the
# teacher's head, in the fused loss over the full vocabulary.
#
# THIS HAS NOT BEEN RUN ON THE HARDWARE THAT IT IS FOR. The layouts and code paths are tested on tiny models on CPU
# ranks; the memory below is arithmetic, not a measurement. Start with --train_iters 5 and look at it.
#
# Hardware: nodes of 8 GPUs of 80 GB. bf16 weights of the teacher: 145 GB, 18 GB a GPU. Student on 2 GPUs: 3.8 G
#           parameters each, 23 GB of weights and fp32 gradients, 46 GB of optimizer state / data parallel size.
#           PLACEMENT=separate: 2 nodes or more, TEACHER_NODES of them the teacher's. PLACEMENT=colocate: 1 node or
#           more, and host memory for the teacher's weights (145 GB a node).
# Time:     not measured.
# Expect:   as train_single_node.sh and train_multi_node.sh say.
#
# Environment:
#   TEACHER, STUDENT  Hugging Face directories (required); the vocabulary has to be the same
#   DATASET           training data, one JSONL or Parquet file (required)
#   SAVE              run directory (default: runs/qwen2.5_72b_to_7b)
#   PLACEMENT         separate: the teacher on its own nodes, working ahead; colocate: on the student's GPUs, in host
#                     memory between its turns (default: separate)
#   TEACHER_NODES     nodes of the teacher with PLACEMENT=separate (default: 1)
#   NNODES            nodes (default: 1) and, above 1, what train_multi_node.sh asks for
#   NPROC_PER_NODE    GPUs per node (default: 8)
#   BATCH             samples per step, approximately: the nearest multiple of the data parallel size
#                     (default: 128)
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"
student_layout=(--tensor_model_parallel_size 2 --sequence_parallel true --use_distributed_optimizer true)
teacher_layout=(--teacher_tensor_model_parallel_size 8 --teacher_pipeline_model_parallel_size 1)
together=(--offload_teacher_model true)
train_pair qwen2.5_72b_to_7b 2 "$@"
