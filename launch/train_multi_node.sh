#!/usr/bin/env bash
# `megatron-gkd train` on several machines: started once on each of them, with the same flags. launch/slurm.sbatch does so.
#
#   NNODES=4 RDZV_ENDPOINT=node0:29500 bash launch/train_multi_node.sh --config run.yaml --save /shared/runs/mine
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/train_multi_node.sh --config run.yaml     # NODE_RANK=1, 2, 3 on the others
#   NNODES=2 RDZV_ENDPOINT=node0 bash launch/train_multi_node.sh --config run.yaml --dry-run     # print and check, start nothing
#
# Flags go to `megatron-gkd train` (docs/configuration.md). --save, models and data have to be the same directories on all
# nodes: a shared file system.
#
# Two ways for the nodes to find each other:
#   RDZV_ENDPOINT    c10d rendezvous, with restarts: when a rank dies, the ranks of ALL nodes are started again, and the run
#                    goes on from its newest checkpoint. A node that is lost may be replaced: start the script on another
#                    one. The node of the endpoint may not; then end the others and start all again (Slurm's requeue does).
#   MASTER_ADDR      static: every node has a number, and nobody tells the others of a failure: no restarts.
# The number of nodes is fixed, since tensor, pipeline and data parallel sizes follow from the number of ranks: a run waits
# for all NNODES, and none joins later. To go on with fewer or more, start it anew (docs/multi_node.md).
#
# Hardware: NNODES machines with the same number of GPUs and a network between them (InfiniBand or RoCE for large models).
# Time:     the run's. A restart costs loading, and the steps since the last checkpoint (--save_steps).
# Expect:   a live line of the first rank, on its node; exit code 0 on every node when the run has ended. Any other is that of
#           the node's rank that ended first, after the last restart (2: an error, 75: stopped, with a checkpoint); the last line says why.
#
# Environment:
#   NNODES            nodes (required)
#   RDZV_ENDPOINT     HOST or HOST:PORT (29500) of one of the nodes, the same everywhere; IPv6 as [ADDRESS]:PORT
#   RDZV_ID           name of the job at the endpoint, the same on all nodes (default: megatron-gkd)
#   RDZV_TIMEOUT_S    seconds to wait for all nodes (default: 900)
#   RDZV_CONF         more of torchrun's --rdzv-conf, as KEY=VALUE,... (keep_alive_interval=5: a node is lost after 3 of them)
#   MASTER_ADDR, MASTER_PORT, NODE_RANK    instead: host and port (29500) of node 0; number of this node, from 0
#   LOCAL_ADDR        address of this node for the others, where its host name does not resolve to it; the node whose
#                     LOCAL_ADDR is the host of RDZV_ENDPOINT keeps the rendezvous
#   NPROC_PER_NODE    ranks a node (default: one a GPU that is visible, else 1)
#   MAX_RESTARTS      times that all ranks are started again (default: 3 with RDZV_ENDPOINT; 0 is the only choice without)
#   AUTO_RESUME       0 leaves out --auto_resume true (default: 1)
#   GKD_VENV          environment to run in, on every node (default: .venv in the repository)
#   OMP_NUM_THREADS   threads a rank (default: 1)
# Network: passed through as they are. None is needed to start; see docs/multi_node.md for what to look at first.
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME    interface of the first contact (for example eth0), where there are several
#   NCCL_IB_HCA       InfiniBand adapters to use (for example mlx5_0,mlx5_1); NCCL_IB_DISABLE=1 uses none
#   NCCL_IB_GID_INDEX, NCCL_IB_TC             RoCE: as the network's administrator says
#   NCCL_DEBUG        WARN or INFO: what NCCL found and chose; NCCL_DEBUG_FILE=/path/nccl.%h.%p writes it to files
#   TORCH_NCCL_ASYNC_ERROR_HANDLING           torch's default ends a rank whose collective failed; leave it, restarts need it
#   CUDA_DEVICE_MAX_CONNECTIONS               (default: 1, which megatron-core wants for tensor and sequence parallelism)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GKD_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
dry_run=false
extra_flags=()

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
die() {
    printf 'train_multi_node: %s\n' "$@" >&2
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
is_port() { [[ $1 =~ ^[1-9][0-9]*$ ]] && (($1 <= 65535)); }

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

nnodes=${NNODES:-}
nproc=${NPROC_PER_NODE:-$(count_gpus)}
[[ -n ${NPROC_PER_NODE:-} || $nproc != 0 ]] || nproc=1
[[ -n $nnodes ]] || die "NNODES is not set; give the number of nodes (see --help)"
[[ $nnodes != *:* ]] || die "NNODES=$nnodes: the number of nodes is fixed, because the parallel layout follows from it; give one number"
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || die "NNODES=$nnodes: give a positive whole number"
[[ $nproc =~ ^[1-9][0-9]*$ ]] || die "NPROC_PER_NODE=$nproc: give a positive whole number"
case ${AUTO_RESUME:-1} in
    0 | false | no) resume_flags=() ;;
    1 | true | yes) resume_flags=(--auto_resume true) ;;
    *) die "AUTO_RESUME=$AUTO_RESUME: give 0 or 1" ;;
esac
((${#extra_flags[@]})) || die "no flags for \`megatron-gkd train\`; it needs at least --model and --dataset (see --help)"
[[ -x $venv/bin/python ]] || die "there is no $venv/bin/python; bash launch/setup_env.sh makes the environment"

# ---- how the nodes find each other ------------------------------------------------------------------------------------
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    [[ -z ${MASTER_ADDR:-} && -z ${NODE_RANK:-} ]] ||
        die "RDZV_ENDPOINT is one way to find the nodes, MASTER_ADDR with NODE_RANK the other; unset one of them"
    endpoint=$RDZV_ENDPOINT
    [[ $endpoint != *://* ]] || die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give HOST or HOST:PORT, without ${endpoint%%://*}://"
    if [[ $endpoint == \[*\] ]]; then
        endpoint=$endpoint:29500
    elif [[ $endpoint == \[* ]]; then
        [[ $endpoint =~ ^\[[^][]+\]:[0-9]+$ ]] || die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give an IPv6 address as [ADDRESS] or [ADDRESS]:PORT"
    elif [[ $endpoint == *:*:* ]]; then # where would the address end?
        die "RDZV_ENDPOINT=$RDZV_ENDPOINT: put an IPv6 address in brackets, [ADDRESS] or [ADDRESS]:PORT"
    elif [[ $endpoint != *:* ]]; then
        endpoint=$endpoint:29500
    fi
    is_port "${endpoint##*:}" || die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give HOST or HOST:PORT, with a port from 1 to 65535"
    host=${endpoint%:*} host=${host#[} host=${host%]}
    [[ -n $host ]] || die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give HOST or HOST:PORT, with a host"
    timeout_s=${RDZV_TIMEOUT_S:-900}
    [[ $timeout_s =~ ^[1-9][0-9]*$ ]] || die "RDZV_TIMEOUT_S=$timeout_s: give a positive whole number of seconds"
    max_restarts=${MAX_RESTARTS:-3}
    # torchrun knows the node of the endpoint by its host name, which may not lead to the address that is used
    is_host=
    [[ ${RDZV_CONF:-} == *is_host=* || ${LOCAL_ADDR:-} != "$host" ]] || is_host=is_host=1
    rendezvous_flags=(
        --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${RDZV_ID:-megatron-gkd}"
        --rdzv-conf "join_timeout=$timeout_s${is_host:+,$is_host}${RDZV_CONF:+,$RDZV_CONF}"
    )
elif [[ -n ${MASTER_ADDR:-} ]]; then
    port=${MASTER_PORT:-29500}
    is_port "$port" || die "MASTER_PORT=$port: give a port from 1 to 65535"
    [[ ${NODE_RANK:-} =~ ^(0|[1-9][0-9]*)$ ]] || die "NODE_RANK=${NODE_RANK:-}: give the number of this node, from 0 to $((nnodes - 1))"
    ((NODE_RANK < nnodes)) || die "NODE_RANK=$NODE_RANK with NNODES=$nnodes: give a number from 0 to $((nnodes - 1))"
    max_restarts=${MAX_RESTARTS:-0}
    [[ $max_restarts == 0 ]] ||
        die "MAX_RESTARTS=$max_restarts: a restart has to be told to all nodes, which MASTER_ADDR cannot; give RDZV_ENDPOINT instead"
    rendezvous_flags=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
else
    die "neither RDZV_ENDPOINT nor MASTER_ADDR is set: how are the nodes to find each other? (see --help)"
fi
[[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "MAX_RESTARTS=$max_restarts: give 0 or a positive whole number"
[[ -z ${LOCAL_ADDR:-} ]] || rendezvous_flags+=(--local-addr "$LOCAL_ADDR")

# ---- environment ------------------------------------------------------------------------------------------------------
environment=(
    "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}"
    # torch (2.13) else keeps one store for all attempts: ranks that are started again find the addresses of the dead ones
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
)

# ---- what is started --------------------------------------------------------------------------------------------------
launcher_flags=(
    --nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "$max_restarts" "${rendezvous_flags[@]}"
)
train_flags=("${resume_flags[@]}" "${extra_flags[@]}")
command=("$venv/bin/python" -m megatron_gkd.launcher "${launcher_flags[@]}" -m megatron_gkd train "${train_flags[@]}")
# Asked once, before any rank is started: what every rank would be refused for is one line then, and the last one.
check=("$venv/bin/python" -m megatron_gkd check train --world_size "$((nnodes * nproc))" --ranks_per_node "$nproc" "${train_flags[@]}")
export "${environment[@]}"
if $dry_run; then
    printf '+'
    printf ' %q' "${environment[@]}" "${command[@]}"
    printf '\n'
    exec "${check[@]}"
fi
"${check[@]}" --read_models false
exec "${command[@]}"
