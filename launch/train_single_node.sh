#!/usr/bin/env bash
# `megatron-gkd train` on all GPUs of one machine, restarted after a failure, from its newest checkpoint.
#
#   bash launch/train_single_node.sh --model path/to/student --teacher_model path/to/teacher --dataset train.jsonl --save runs/mine
#   NPROC_PER_NODE=2 bash launch/train_single_node.sh --config run.yaml --device cpu       # two processes on a CPU
#   bash launch/train_single_node.sh --config run.yaml --dry-run                          # print the command, check all, start nothing
#
# Flags go to `megatron-gkd train` (docs/configuration.md). The same command, given again after an interruption, goes on
# with the run in --save; --auto_resume false begins a new one, and refuses a --save that holds another.
#
# Hardware: GPUs that hold student, optimizer and teacher in the layout that the flags give; or a CPU, for tiny models.
# Time:     the run's. A restart costs loading, and the steps since the last checkpoint (--save_steps).
# Expect:   a live line of the first rank (step, loss, tokens/s, time left); exit code 0 when the run has ended. Any other is that of
#           the rank that ended first, after the last restart (2: an error, 75: stopped, with a checkpoint); the last line says why.
#
# Environment:
#   NPROC_PER_NODE    ranks (default: one a GPU that is visible, else 1)
#   MAX_RESTARTS      times that all ranks are started again after one has failed (default: 3)
#   AUTO_RESUME       0 leaves out --auto_resume true (default: 1)
#   GKD_VENV          environment to run in (default: .venv in the repository)
#   OMP_NUM_THREADS   threads a rank (default: 1)
#   CUDA_DEVICE_MAX_CONNECTIONS    (default: 1, which megatron-core wants for tensor and sequence parallelism: communication
#                     is then issued in the order of the program)
#   PYTORCH_CUDA_ALLOC_CONF, NCCL_DEBUG and all others are passed through; those of several nodes: train_multi_node.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GKD_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
dry_run=false
extra_flags=()

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
die() {
    printf 'train_single_node: %s\n' "$@" >&2
    exit 2
}
count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true
    else
        echo 0
    fi
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

nproc=${NPROC_PER_NODE:-$(count_gpus)}
[[ -n ${NPROC_PER_NODE:-} || $nproc != 0 ]] || nproc=1
max_restarts=${MAX_RESTARTS:-3}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || die "NPROC_PER_NODE=$nproc: give a positive whole number"
[[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "MAX_RESTARTS=$max_restarts: give 0 or a positive whole number"
case ${AUTO_RESUME:-1} in
    0 | false | no) resume_flags=() ;;
    1 | true | yes) resume_flags=(--auto_resume true) ;;
    *) die "AUTO_RESUME=$AUTO_RESUME: give 0 or 1" ;;
esac
((${#extra_flags[@]})) || die "no flags for \`megatron-gkd train\`; it needs at least --model and --dataset (see --help)"
[[ -x $venv/bin/python ]] || die "there is no $venv/bin/python; bash launch/setup_env.sh makes the environment"

# ---- environment ------------------------------------------------------------------------------------------------------
environment=(
    "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}"
    # torch (2.13) else keeps one store for all attempts: ranks that are started again find the addresses of the dead ones
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
)

# ---- what is started --------------------------------------------------------------------------------------------------
launcher_flags=(--standalone --nproc-per-node "$nproc" --max-restarts "$max_restarts")
train_flags=("${resume_flags[@]}" "${extra_flags[@]}")
command=("$venv/bin/python" -m megatron_gkd.launcher "${launcher_flags[@]}" -m megatron_gkd train "${train_flags[@]}")
# Asked once, before any rank is started: what every rank would be refused for is one line then, and the last one.
check=("$venv/bin/python" -m megatron_gkd check train --world_size "$nproc" --ranks_per_node "$nproc" "${train_flags[@]}")
export "${environment[@]}"
if $dry_run; then
    printf '+'
    printf ' %q' "${environment[@]}" "${command[@]}"
    printf '\n'
    exec "${check[@]}"
fi
"${check[@]}" --read_models false
exec "${command[@]}"
