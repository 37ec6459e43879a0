#!/usr/bin/env bash
# On-policy distillation: the student writes every completion itself (lmbda 1), the teacher judges each token of it by
# the reverse KL (beta 1). The data set gives prompts alone.
#
#   STUDENT=path/to/student TEACHER=path/to/teacher DATASET=prompts.jsonl bash launch/on_policy_distillation.sh
#   ... bash launch/on_policy_distillation.sh --teacher_tensor_model_parallel_size 4 --max_completion_length 2048
#   NNODES=2 RDZV_ENDPOINT=node0 ... bash launch/on_policy_distillation.sh                     # on each of 2 nodes
#   ... bash launch/on_policy_distillation.sh --dry-run   # print, check all, start nothing
#
# Further flags go to `megatron-gkd train` and override those here (except --dataset, which is DATASET's).
# vLLM samples in the training processes, with the weights of the step; docs/rollout.md has the other ways (--vllm_mode
# server with launch/rollout_server.sh). The student has to be able to write: one that was cut from a larger model and
# not yet trained samples noise and learns little from it; begin with --lmbda 0, or 0.5.
#
# Hardware: GPUs that hold student, optimizer, teacher and, in VLLM_MEMORY of each GPU, vLLM's copy of the student with
#           its KV cache. On a CPU for tiny models alone. Not run on GPUs yet.
# Time:     not measured on GPUs; sampling is usually the larger part of a step (rollout_s against step_time_s in
#           metrics.jsonl).
# Expect:   as train_single_node.sh says; `loss` is the reverse KL in nats a token, on the student's own text: it starts
#           low for a student that writes noise, so judge by held-out text (--eval_dataset) instead.
#
# Environment:
#   STUDENT, TEACHER  Hugging Face directories (required)
#   DATASET           prompts, one JSONL or Parquet file (required); completions in it are not used
#   SAVE              run directory (default: runs/on_policy)
#   VLLM_MEMORY       share of each GPU's memory for vLLM (default: 0.3)
#   NNODES            nodes (default: 1) and, above 1, what train_multi_node.sh asks for
#   NPROC_PER_NODE    ranks per node (default: one per visible GPU, else 1)
#   BATCH             samples per step, approximately: the nearest multiple of the data parallel size
#                     (default: 64)
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

# value_of NAME "$@": of a flag of the caller's, with hyphens or underscores; 1 without it
value_of() {
    local name=$1 value=1 word
    while shift && (($#)); do
        word=${1//-/_}
        case $word in
            "__$name") value=${2:-} ;;
            "__$name="*) value=${word#*=} ;;
        esac
    done
    [[ $value =~ ^[1-9][0-9]*$ ]] || value=1
    echo "$value"
}

help_if_asked "$@"
nnodes=${NNODES:-1}
vllm_memory=${VLLM_MEMORY:-0.3}
batch=${BATCH:-64}
ranks_of_this_node
positive BATCH "$batch"
positive NNODES "$nnodes"
[[ $vllm_memory =~ ^(1|0?\.[0-9]*[1-9][0-9]*)$ ]] ||
    die "VLLM_MEMORY=$vllm_memory: give a share above 0 and at most 1, such as 0.3"
model_directory TEACHER
model_directory STUDENT
data_file DATASET

model_parallel=$(($(value_of tensor_model_parallel_size "$@") * $(value_of pipeline_model_parallel_size "$@") *
    $(value_of context_parallel_size "$@")))
samples=$(batch_near "$batch" $((nnodes * nproc / model_parallel)))

model_flags=(--model "$STUDENT" --teacher_model "$TEACHER" --dtype bf16)
method_flags=(--lmbda 1 --beta 1)
sampling_flags=(
    --temperature 1.0 --top_p 1.0 --max_completion_length 1024
    --vllm_mode colocate --vllm_gpu_memory_utilization "$vllm_memory" --verify_sync_every 50
)
data_flags=(--dataset "$DATASET" --max_length 2048 --micro_batch_size 1 --global_batch_size "$samples")
optimizer_flags=(--lr 1e-5 --lr_decay_style constant --lr_warmup_fraction 0.05)
run_flags=(--save "${SAVE:-runs/on_policy}" --save_steps 50 --save_total_limit 3)

train_on "$nnodes" "${model_flags[@]}" "${method_flags[@]}" "${sampling_flags[@]}" \
    "${data_flags[@]}" "${optimizer_flags[@]}" "${run_flags[@]}" "$@"
