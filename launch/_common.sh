# shellcheck shell=bash
# What the scripts share. Each of them sources this file; it starts nothing by itself.
#
# Set here: root (the checkout), venv (GKD_VENV, else .venv of the checkout; absolute), program (name of the script in
# its messages), dry_run and extra_flags (see take_flags). The --help of a script is its own head comment.
#
# shellcheck disable=SC2034 # the variables are for the scripts

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${GKD_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
program=${0##*/} program=${program%.sh}
dry_run=false
extra_flags=()

# ---- messages --------------------------------------------------------------------------------------------------------
say() { printf '%s: %s\n' "$program" "$*"; }
warn() { printf '%s\n' "${@/#/$program: }" >&2; }
die() {
    warn "$@"
    exit "${error_status:-2}"
}
usage() { sed -n '2,/^set -/{/^set -/d;/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"; }

# ---- the command line ------------------------------------------------------------------------------------------------
help_if_asked() {
    local word
    for word in "$@"; do
        case $word in -h | --help) usage && exit 0 ;; esac
    done
}
# take_flags "$@": answers --help, sets dry_run for --dry-run, leaves the others in extra_flags
take_flags() {
    local word
    help_if_asked "$@"
    for word in "$@"; do
        if [[ $word == --dry-run ]]; then dry_run=true; else extra_flags+=("$word"); fi
    done
}
# show PREFIX WORD...: a command, quoted for a shell
show() {
    printf '%s' "$1"
    printf ' %q' "${@:2}"
    printf '\n'
}
# run WORD...: a dry run shows it instead
run() { if $dry_run; then show + "$@"; else "$@"; fi; }

# ---- variables: NAME VALUE -------------------------------------------------------------------------------------------
positive() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1=$2: give a positive whole number"; }
zero_or_positive() { [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || die "$1=$2: give 0 or a positive whole number"; }
is_port() { [[ $1 =~ ^[1-9][0-9]*$ ]] && (($1 <= 65535)); }
port_number() { is_port "$2" || die "$1=$2: give a port from 1 to 65535"; }
# switched_on NAME VALUE: for `if`, where `die` would end the script nevertheless
switched_on() {
    case $2 in
        0 | false | no) return 1 ;;
        1 | true | yes) return 0 ;;
        *) die "$1=$2: give 0 or 1" ;;
    esac
}
# model_directory NAME [WHAT], data_file NAME: of the variable NAME
model_directory() {
    [[ -n ${!1:-} ]] || die "$1 is not set; give ${2:-a} Hugging Face directory (see --help)"
    [[ -f ${!1}/config.json ]] || die "$1=${!1}: there is no config.json in it"
}
data_file() {
    [[ -n ${!1:-} ]] || die "$1 is not set; give a JSONL or Parquet file (see --help)"
    [[ -f ${!1} ]] || die "$1=${!1}: there is no such file"
}
environment_is_there() {
    [[ -x $venv/bin/python ]] || die "there is no $venv/bin/python; bash launch/setup_env.sh makes the environment"
}

# ---- training --------------------------------------------------------------------------------------------------------
count_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true
    else
        echo 0
    fi
}
# Sets nproc: NPROC_PER_NODE, else one rank a GPU that is visible, else 1.
ranks_of_this_node() {
    nproc=${NPROC_PER_NODE:-$(count_gpus)}
    [[ -n ${NPROC_PER_NODE:-} || $nproc != 0 ]] || nproc=1
    positive NPROC_PER_NODE "$nproc"
}
# batch_near BATCH DATA_PARALLEL: the nearest number of samples that the data parallel size divides
batch_near() {
    local data_parallel=$(($2 > 0 ? $2 : 1))
    local per_rank=$((($1 + data_parallel / 2) / data_parallel))
    echo $(((per_rank > 0 ? per_rank : 1) * data_parallel))
}
# train_on NNODES FLAG...: hands a recipe's flags to the script for one node or several
train_on() {
    local launcher=train_multi_node.sh
    (($1 > 1)) || launcher=train_single_node.sh
    exec bash "$root/launch/$launcher" "${@:2}"
}
# train_pair RUN REPLICA_RANKS FLAG...: `train` of a large teacher and a student, with the script's arrays
# student_layout, teacher_layout and together (what makes room where PLACEMENT=colocate), a replica of the student on so
# many ranks, and the run directory runs/RUN. The environment is as the recipe's header says: TEACHER, STUDENT, DATASET,
# SAVE, PLACEMENT, TEACHER_NODES, NNODES, NPROC_PER_NODE, BATCH.
# shellcheck disable=SC2154 # the arrays are the script's
train_pair() {
    local nnodes=${NNODES:-1} teacher_nodes=${TEACHER_NODES:-1} batch=${BATCH:-128} student_nodes samples
    local placement model_flags loss_flags data_flags optimizer_flags run_flags
    export NPROC_PER_NODE=${NPROC_PER_NODE:-8}
    positive NNODES "$nnodes"
    positive TEACHER_NODES "$teacher_nodes"
    positive NPROC_PER_NODE "$NPROC_PER_NODE"
    positive BATCH "$batch"
    model_directory TEACHER
    model_directory STUDENT
    data_file DATASET
    case ${PLACEMENT:-separate} in
        separate)
            student_nodes=$((nnodes - teacher_nodes))
            if ((student_nodes <= 0)); then
                local given="NNODES=$nnodes and TEACHER_NODES=$teacher_nodes"
                die "PLACEMENT=separate with $given leaves no node for the student; give more, or PLACEMENT=colocate"
            fi
            placement=(--teacher_placement separate --teacher_nodes "$teacher_nodes")
            ;;
        colocate)
            [[ -z ${TEACHER_NODES:-} ]] || die "TEACHER_NODES=$TEACHER_NODES is for PLACEMENT=separate; unset it"
            placement=(--teacher_placement colocate "${together[@]}")
            student_nodes=$nnodes
            ;;
        *) die "PLACEMENT=$PLACEMENT: give separate or colocate" ;;
    esac
    samples=$(batch_near "$batch" $((student_nodes * NPROC_PER_NODE / $2)))
    model_flags=(--model "$STUDENT" --teacher_model "$TEACHER" --dtype bf16)
    # The data set's completions teach; beta 0.5 weighs both directions of the divergence.
    loss_flags=(--lmbda 0 --seq_kd false --beta 0.5 --loss_path fused)
    data_flags=(--dataset "$DATASET" --max_length 4096 --micro_batch_size 1 --global_batch_size "$samples")
    optimizer_flags=(--lr 1e-5 --min_lr 1e-6 --lr_decay_style cosine --lr_warmup_fraction 0.05)
    run_flags=(--save "${SAVE:-runs/$1}" --save_steps 100 --save_total_limit 3)
    # The first pass loads the teacher while the others wait.
    run_flags+=(--distributed_timeout_minutes 30)
    train_on "$nnodes" "${model_flags[@]}" "${student_layout[@]}" "${teacher_layout[@]}" "${placement[@]}" \
        "${loss_flags[@]}" "${data_flags[@]}" "${optimizer_flags[@]}" "${run_flags[@]}" "${@:3}"
}
# start_training WORLD_SIZE TORCHRUN_FLAG...: `megatron-gkd train` with extra_flags and what AUTO_RESUME says, on nproc
# ranks of this node. `check train` is asked once before any rank starts: what every rank would refuse is one line then.
start_training() {
    local environment train_flags=("${extra_flags[@]}") python=$venv/bin/python
    ((${#extra_flags[@]})) ||
        die "no flags for \`megatron-gkd train\`; it needs at least --model and --dataset (see --help)"
    if switched_on AUTO_RESUME "${AUTO_RESUME:-1}"; then train_flags=(--auto_resume true "${extra_flags[@]}"); fi
    environment_is_there
    environment=(
        "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" "CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
        "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}"
        # torch 2.13 keeps one store for all attempts: restarted ranks would find the addresses of the dead ones there
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    )
    command=("$python" -m megatron_gkd.commands.launcher "${@:2}" -m megatron_gkd train "${train_flags[@]}")
    check=("$python" -m megatron_gkd check train --world_size "$1" --ranks_per_node "$nproc" "${train_flags[@]}")
    export "${environment[@]}"
    if $dry_run; then
        show + "${environment[@]}" "${command[@]}"
        exec "${check[@]}"
    fi
    "${check[@]}" --read_models false
    exec "${command[@]}"
}

# ---- vLLM servers ----------------------------------------------------------------------------------------------------
# server_settings WHOSE: checks MODEL, HOST, PORT, TP, DTYPE and KV_CACHE_BYTES; sets host, port and server_flags
server_settings() {
    model_directory MODEL "the $1's"
    host=${HOST:-127.0.0.1}
    port=${PORT:-8000}
    port_number PORT "$port"
    positive TP "${TP:-1}"
    on_cpu=true
    if [[ -e /dev/nvidiactl || -e /dev/kfd ]]; then on_cpu=false; fi
    local dtype=bf16 # by default that of the run's --dtype
    if $on_cpu; then dtype=fp32; fi
    case ${DTYPE:-$dtype} in
        fp32) dtype=float32 ;;
        bf16) dtype=bfloat16 ;;
        fp16) dtype=float16 ;;
        *) die "DTYPE=$DTYPE: give fp32, bf16 or fp16" ;;
    esac
    server_flags=(--model "$MODEL" --host "$host" --port "$port" --dtype "$dtype" --tensor-parallel-size "${TP:-1}")
    [[ -z ${MAX_MODEL_LEN:-} ]] || server_flags+=(--max-model-len "$MAX_MODEL_LEN")
    if $on_cpu; then
        # by default vLLM takes nearly all memory; threads beyond the cores wait for each other; "auto" binding fails
        # where there are few NUMA nodes
        server_flags+=(--enforce-eager --kv-cache-memory-bytes "${KV_CACHE_BYTES:-1073741824}")
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
        export TORCHDYNAMO_DISABLE=${TORCHDYNAMO_DISABLE:-1}
    else
        server_flags+=(--gpu-memory-utilization "${GPU_MEMORY:-0.9}")
        [[ -z ${KV_CACHE_BYTES:-} ]] || server_flags+=(--kv-cache-memory-bytes "$KV_CACHE_BYTES")
    fi
    export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
}
on_loopback() { [[ $host == 127.* || $host == localhost || $host == ::1 ]]; }
# sendable_key NAME: of the variable NAME, whose value is not shown
sendable_key() {
    if [[ -n ${!1:-} && $(LC_ALL=C tr -d '!-~' <<<"${!1}" | wc -c) -ne 1 ]]; then
        die "$1 holds a blank, a line end or another character that cannot be sent; it is not shown here"
    fi
}
port_is_free() {
    if (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; then die "port $port of $host is in use; give another PORT"; fi
}
