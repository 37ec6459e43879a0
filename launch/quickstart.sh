#!/usr/bin/env bash
# From a fresh checkout to a distilled, exported and measured student, on a machine without a GPU and without an
# account.
#
#   bash launch/quickstart.sh                  # SmolLM2-135M (30 layers) teaches a 24-layer student cut from it
#   bash launch/quickstart.sh --offline   # the same on tiny random models made here: nothing is fetched but packages
#   bash launch/quickstart.sh --steps 5 --out runs/short --beta 0.5      # further flags go to `megatron-gkd train`
#
# Stages: environment (.venv, pinned packages), model and data (cache/), training on 2 processes, a replica of both
# models in each (torchrun, gloo), report. The first half of the steps learns from the data's completions, the second
# from what the student samples itself, by a vLLM in each of the two processes. Each stage that is done is not done
# again: a second run starts in seconds and prints the report; an interrupted run goes on from its last checkpoint.
#
# Hardware: 2 CPU cores, 8 GB of memory, 4 GB of disk. No GPU. See docs/quickstart.md.
# Time:     set-up 1 to 5 minutes once; then 12 minutes on 2 idle cores, 8 of them steps; with --offline about one.
# Expect:   a live line (step, loss, tokens/s, time left), then a table before, half-way and after, over held-out text:
#           the student's most probable token is the teacher's in three of four places, and more. OUT/hf is the student
#           for transformers; OUT/report holds the table, the curve and report.html, a page to look at.
#
# Options:
#   --offline      tiny random models instead of SmolLM2 (also GKD_OFFLINE=1): shows the machinery, learns no skill
#   --steps N      training steps, half of them on the student's samples (default: examples/quickstart/run.yaml)
#   --out DIR      run directory (default: runs/quickstart, runs/quickstart-offline)
#   --fresh        throw away the run in --out and train again
#   --dry-run      print the commands of every stage, run none
# Environment: GKD_VENV, GKD_PYTHON, GKD_PIP_ARGS as in launch/setup_env.sh; GKD_CACHE (default: cache in the
# repository).
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

cache=${GKD_CACHE:-cache}
offline=false
case ${GKD_OFFLINE:-0} in 1 | true | yes) offline=true ;; esac
steps=
out=
fresh=false

stage() { printf '\n== %s\n' "$*"; }
value_of() {
    if (($# < 2)) || [[ -z $2 || $2 == -* ]]; then die "$1 needs a value (see --help)"; fi
}

help_if_asked "$@"
while (($#)); do
    case $1 in
        --offline) offline=true ;;
        --steps) value_of "$@" && steps=$2 && shift ;;
        --steps=*) steps=${1#*=} ;;
        --out) value_of "$@" && out=$2 && shift ;;
        --out=*) out=${1#*=} ;;
        --fresh) fresh=true ;;
        --dry-run) dry_run=true ;;
        *) extra_flags+=("$1") ;;
    esac
    shift
done
[[ -z $steps ]] || positive --steps "$steps"
# relative paths that the caller gives are relative to where the caller is; the defaults are inside the repository
[[ -z $out || $out == /* ]] || out=$PWD/$out
[[ -z ${GKD_CACHE:-} || $cache == /* ]] || cache=$PWD/$cache
export GKD_VENV=$venv
cd "$root"

if $offline; then
    name=quickstart-offline
    data=$cache/tiny
    layers=0,3
    steps=${steps:-40}
    variant_flags=(--lr 1e-2 --min_lr 1e-3 --max_length 128 --eval_samples 32 --freeze_embeddings false)
    variant_flags+=(--max_completion_length 32)
else
    name=quickstart
    data=$cache/quickstart
    layers=0-2,6,8-24,27-29
    variant_flags=()
fi
out=${out:-runs/$name}

# ---- environment -----------------------------------------------------------------------------------------------------
stage "environment"
run bash launch/setup_env.sh
python=$venv/bin/python
# One thread per process. Two processes share two cores; more threads than that wait for each other.
export OMP_NUM_THREADS=1
# Nothing here needs a hub: models and data are local directories.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# megatron-core says at import, once per process, that it has neither Apex nor Transformer Engine: known and meant,
# without a GPU.
for module in optimizer.optimizer optimizer.clip_grads models.backends; do
    PYTHONWARNINGS=${PYTHONWARNINGS:+$PYTHONWARNINGS,}ignore::UserWarning:megatron.core.$module
done
export PYTHONWARNINGS

# ---- model and data --------------------------------------------------------------------------------------------------
stage "model and data: $data"
if $offline; then
    run "$python" examples/quickstart/make_tiny.py --out "$data"
    data_dir=$data/data
else
    run "$python" examples/quickstart/prepare_model.py --out "$data/teacher" --cache "$cache/downloads"
    data_dir=$data/data
    run "$python" examples/quickstart/prepare_data.py --out "$data_dir"
fi
run "$python" examples/quickstart/cut_student.py --model "$data/teacher" --out "$data/student" --layers "$layers"

# ---- training --------------------------------------------------------------------------------------------------------
model_flags=(--model "$data/student" --teacher_model "$data/teacher")
data_flags=(--dataset "$data_dir/train.jsonl" --eval_dataset "$data_dir/held_out.jsonl")
run_flags=(--save "$out")
if [[ -n $steps ]]; then
    half=$(((steps + 1) / 2))
    run_flags+=(--train_iters "$steps" --lmbda "stepwise,0:0,$((half + 1)):1" --eval_steps "$half" --save_steps "$half")
fi
train_flags=(
    --config examples/quickstart/run.yaml
    "${model_flags[@]}" "${data_flags[@]}" "${variant_flags[@]}" "${run_flags[@]}" "${extra_flags[@]}"
)
# What this run is: a finished run is not repeated, and one of other settings is not taken for it.
settings=$(printf '%s\n' "${train_flags[@]}" && cat examples/quickstart/run.yaml)
marker=$out/quickstart.settings

stage "training: $out"
resume_flags=()
finished=false
if [[ -e $out && ! -f $marker && -n $(ls -A "$out") ]]; then
    die "$out was not made by this script, so it is left alone; give another --out"
elif [[ -e $out ]]; then
    if ! $fresh && [[ -f $out/metrics.jsonl && $(<"$marker") != "$settings" ]]; then
        die "$out holds a run with other settings." "Give --fresh to throw it away, or another --out to keep both."
    elif ! $fresh && [[ -f $out/hf/config.json ]]; then
        finished=true
    elif ! $fresh && [[ -f $out/metrics.jsonl && -e $out/checkpoints/latest ]]; then
        resume_flags=(--load "$out")
    else # --fresh, or interrupted before the first checkpoint
        run rm -rf -- "$out"
    fi
fi
if $finished; then
    echo "finished before; --fresh trains again"
else
    if ! $dry_run; then
        mkdir -p "$out"
        printf '%s\n' "$settings" >"$marker"
    fi
    run "$python" -m megatron_gkd.commands.launcher --standalone --nproc-per-node 2 \
        -m megatron_gkd train "${train_flags[@]}" "${resume_flags[@]}"
fi

# ---- report ----------------------------------------------------------------------------------------------------------
stage "report"
if $finished && [[ $out/report/summary.txt -nt $out/hf/config.json ]]; then
    run cat "$out/report/summary.txt"
else
    run "$python" -m megatron_gkd report "$out"
fi
printf '\nstudent:     %s\nto look at:  %s\nTensorBoard: %s\n' "$out/hf" "$out/report/report.html" \
    "$venv/bin/tensorboard --logdir $out/tensorboard"
