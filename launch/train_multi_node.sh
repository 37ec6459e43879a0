#!/usr/bin/env bash
# `megatron-gkd train` on several machines, started once on each of them with the same flags.
#
#   NNODES=4 RDZV_ENDPOINT=node0:29500 bash launch/train_multi_node.sh --config run.yaml --save /shared/runs/mine
#   # NODE_RANK=1, 2, 3 on the others
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash launch/train_multi_node.sh --config run.yaml
#   # print and check, start nothing
#   NNODES=2 RDZV_ENDPOINT=node0 bash launch/train_multi_node.sh --config run.yaml --dry-run
#
# Flags go to `megatron-gkd train` (docs/configuration.md). --save, models and data have to be the same directories on
# all nodes: a shared file system.
#
# Two ways for the nodes to find each other:
#   RDZV_ENDPOINT    c10d rendezvous, with restarts: when a rank dies, the ranks of ALL nodes are started again, and the
#                    run goes on from its newest checkpoint. A node that is lost may be replaced: start the script on
#                    another one. The node of the endpoint may not; then end the others and start all again (Slurm's
#                    requeue does).
#   MASTER_ADDR      static: every node has a number, and nobody tells the others of a failure: no restarts.
# The number of nodes is fixed, since tensor, pipeline and data parallel sizes follow from the number of ranks: a run
# waits for all NNODES, and none joins later. To go on with fewer or more, start it anew (docs/multi_node.md).
#
# Hardware: NNODES machines with the same number of GPUs, and a network (InfiniBand or RoCE for large models).
# Time:     the run's. A restart costs loading, and the steps since the last checkpoint (--save_steps).
# Expect:   a live line of the first rank, on its node; exit code 0 on every node when the run has ended. Any other is
#           that of the node's rank that ended first, after the last restart (2: an error, 75: stopped, with a
#           checkpoint); the last line says why.
#
# Environment:
#   NNODES            nodes (required)
#   RDZV_ENDPOINT     HOST or HOST:PORT (29500) of one of the nodes, the same everywhere; IPv6 as [ADDRESS]:PORT
#   RDZV_ID           name of the job at the endpoint, the same on all nodes (default: megatron-gkd)
#   RDZV_TIMEOUT_S    seconds to wait for all nodes (default: 900)
#   RDZV_CONF         more of torchrun's --rdzv-conf, as KEY=VALUE,... (keep_alive_interval=5: a node is lost after 3 of
#                     them)
#   MASTER_ADDR, MASTER_PORT, NODE_RANK    instead: host and port (29500) of node 0; number of this node, from 0
#   LOCAL_ADDR        address of this node for the others, where its host name does not resolve to it; the node whose
#                     LOCAL_ADDR is the host of RDZV_ENDPOINT keeps the rendezvous
#   NPROC_PER_NODE    ranks per node (default: one per visible GPU, else 1)
#   MAX_RESTARTS      times that all ranks are started again (default: 3 with RDZV_ENDPOINT; 0 is the only choice
#                     without)
#   AUTO_RESUME       0 leaves out --auto_resume true (default: 1)
#   GKD_VENV          environment to run in, on every node (default: .venv in the repository)
#   OMP_NUM_THREADS   threads per rank (default: 1)
# Network: passed through as they are. None is needed to start; see docs/multi_node.md for what to look at first.
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME    interface of the first contact (for example eth0), where there are several
#   NCCL_IB_HCA       InfiniBand adapters to use (for example mlx5_0,mlx5_1); NCCL_IB_DISABLE=1 uses none
#   NCCL_IB_GID_INDEX, NCCL_IB_TC             RoCE: as the network's administrator says
#   NCCL_DEBUG        WARN or INFO: what NCCL found and chose; NCCL_DEBUG_FILE=/path/nccl.%h.%p writes it to files
#   TORCH_NCCL_ASYNC_ERROR_HANDLING           torch's default ends a rank whose collective failed; leave it, restarts
#                                             need it
#   CUDA_DEVICE_MAX_CONNECTIONS               (default: 1, which megatron-core wants for tensor and sequence
#                                             parallelism)
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

take_flags "$@"
nnodes=${NNODES:-}
[[ -n $nnodes ]] || die "NNODES is not set; give the number of nodes (see --help)"
[[ $nnodes != *:* ]] ||
    die "NNODES=$nnodes: the number of nodes is fixed, because the parallel layout follows from it; give one number"
positive NNODES "$nnodes"
ranks_of_this_node

# ---- how the nodes find each other -----------------------------------------------------------------------------------
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    [[ -z ${MASTER_ADDR:-} && -z ${NODE_RANK:-} ]] ||
        die "RDZV_ENDPOINT is one way to find the nodes, MASTER_ADDR with NODE_RANK the other; unset one of them"
    endpoint=$RDZV_ENDPOINT
    [[ $endpoint != *://* ]] || die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give HOST or HOST:PORT, without ${endpoint%%://*}://"
    if [[ $endpoint == \[*\] ]]; then
        endpoint=$endpoint:29500
    elif [[ $endpoint == \[* ]]; then
        [[ $endpoint =~ ^\[[^][]+\]:[0-9]+$ ]] ||
            die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give an IPv6 address as [ADDRESS] or [ADDRESS]:PORT"
    elif [[ $endpoint == *:*:* ]]; then # where would the address end?
        die "RDZV_ENDPOINT=$RDZV_ENDPOINT: put an IPv6 address in brackets, [ADDRESS] or [ADDRESS]:PORT"
    elif [[ $endpoint != *:* ]]; then
        endpoint=$endpoint:29500
    fi
    is_port "${endpoint##*:}" || die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give HOST or HOST:PORT, with a port from 1 to 65535"
    host=${endpoint%:*} host=${host#[} host=${host%]}
    [[ -n $host ]] || die "RDZV_ENDPOINT=$RDZV_ENDPOINT: give HOST or HOST:PORT, with a host"
    timeout_s=${RDZV_TIMEOUT_S:-900}
    positive RDZV_TIMEOUT_S "$timeout_s"
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
    port_number MASTER_PORT "$port"
    [[ ${NODE_RANK:-} =~ ^(0|[1-9][0-9]*)$ ]] ||
        die "NODE_RANK=${NODE_RANK:-}: give the number of this node, from 0 to $((nnodes - 1))"
    ((NODE_RANK < nnodes)) || die "NODE_RANK=$NODE_RANK with NNODES=$nnodes: give a number from 0 to $((nnodes - 1))"
    max_restarts=${MAX_RESTARTS:-0}
    [[ $max_restarts == 0 ]] ||
        die "MAX_RESTARTS=$max_restarts: MASTER_ADDR cannot restart the other nodes; give RDZV_ENDPOINT instead"
    rendezvous_flags=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
else
    die "neither RDZV_ENDPOINT nor MASTER_ADDR is set: how are the nodes to find each other? (see --help)"
fi
zero_or_positive MAX_RESTARTS "$max_restarts"
[[ -z ${LOCAL_ADDR:-} ]] || rendezvous_flags+=(--local-addr "$LOCAL_ADDR")

# ---- what is started -------------------------------------------------------------------------------------------------
launcher_flags=(--nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "$max_restarts" "${rendezvous_flags[@]}")
start_training "$((nnodes * nproc))" "${launcher_flags[@]}"
