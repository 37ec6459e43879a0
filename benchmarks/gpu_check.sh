#!/usr/bin/env bash
# Everything that one GPU can say about this code, in nine minutes, written to one file after every part.
#
#   bash benchmarks/gpu_check.sh --wheels DIR                       # writes benchmarks/results/gpu.json
#   bash benchmarks/gpu_check.sh --parts exact step --json OUT      # some parts alone; --help of the module has the rest
#   bash benchmarks/gpu_check.sh --device cpu --quick --json OUT    # the same parts in small shapes, without a GPU
#
# Hardware: one GPU of 80 GB, 20 GB of memory or disk for random models. No network, vLLM or Transformer Engine.
# Time:     9 minutes at most, with or without results for the last parts.
# Expect:   a line per part, then "every part that ran is well". Exit code 1: a part has failed or was cut.
#
# Needed: Python 3.11 or 3.12 with torch for CUDA, Triton and transformers. What else the package imports comes from
# the wheels of --wheels (or GKD_WHEELS), which are unpacked into a directory of their own: megatron-core, einops,
# liger-kernel, pytest (with iniconfig, pluggy), and what is said to be missing.
#
# Environment:
#   GKD_PYTHON  the interpreter (default: the environment of launch/setup_env.sh, else python3)
#   GKD_WHEELS  as --wheels
set -euo pipefail
# shellcheck source=../launch/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/_common.sh"

help_if_asked "$@"
wheels=${GKD_WHEELS:-}
words=()
while (($#)); do
    case $1 in
        --wheels)
            [[ $# -ge 2 ]] || die "--wheels needs a directory"
            wheels=$2
            shift
            ;;
        *) words+=("$1") ;;
    esac
    shift
done
python=${GKD_PYTHON:-}
if [[ -z $python ]]; then
    if [[ -x $venv/bin/python ]]; then python=$venv/bin/python; else python=python3; fi
fi
command -v "$python" >/dev/null || die "there is no $python; name an interpreter: GKD_PYTHON"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [[ -n $wheels ]]; then
    shopt -s nullglob
    found=("$wheels"/*.whl)
    ((${#found[@]})) || die "--wheels $wheels: there is no wheel in it"
    # pure unpacking: nothing is resolved or fetched, and packages of the machine stay as they are
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${found[@]}" ||
        die "the wheels of $wheels cannot be installed on $("$python" --version)"
fi
export PYTHONPATH=$root:$site${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cd "$root"
missing=$("$python" - <<'PYTHON'
from importlib.util import find_spec

NEEDED = {"megatron-core": "megatron", "liger-kernel": "liger_kernel", "PyYAML": "yaml"}
names = "torch triton transformers huggingface_hub tokenizers safetensors einops jsonargparse httpx numpy pyarrow"
NEEDED |= {name: name for name in f"{names} matplotlib tqdm psutil sentencepiece tensorboard pytest".split()}
print(" ".join(name for name, module in NEEDED.items() if find_spec(module) is None))
PYTHON
)
[[ -z $missing ]] || warn "not installed: $missing; parts that need them will fail (put their wheels into --wheels)"

given=" ${words[*]:-} "
[[ $given == *" --json "* ]] || words+=(--json benchmarks/results/gpu.json)
if [[ $given != *" --dir "* && -d /dev/shm ]] && (($(df --output=avail -k /dev/shm | tail -1) > 40000000)); then
    words+=(--dir /dev/shm)
fi
"$python" -m benchmarks.gpu_check "${words[@]}"
