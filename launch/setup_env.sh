#!/usr/bin/env bash
# Make the Python environment of megatron-gkd: .venv in the repository, pinned packages, the package itself (editable).
#
#   bash launch/setup_env.sh           # CPU set: requirements/cpu.txt; on Python 3.12 what cpu-py312.txt says instead
#   bash launch/setup_env.sh --gpu     # CUDA set: requirements/gpu.txt (compiles transformer-engine's torch extension)
#
# Hardware: any x86-64 Linux; about 2 GB of disk for the CPU set (7 GB with the CUDA build of torch).
#           Needs Python 3.11 or 3.12 with the venv module.
# Time:     1 to 5 minutes, most of it download; a second run compares a stamp and returns at once.
# Expect:   one line per stage; the last line is "environment ready: <path>".
#
# Environment:
#   GKD_VENV      where the environment lives (default: .venv in the repository)
#   GKD_PYTHON    the interpreter to make it with (default: python3.11, else python3.12, else python3)
#   GKD_PIP_ARGS  extra arguments for every call of the installer, for instance another index. On a machine without a
#                 GPU point it at the index of torch's CPU builds:  GKD_PIP_ARGS="--extra-index-url <URL>"
#                 Otherwise a default index may deliver the CUDA build: it works too, with several GB more.
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
error_status=1
set_name=cpu

help_if_asked "$@"
while (($#)); do
    case $1 in
        --gpu) set_name=gpu ;;
        --dry-run) dry_run=true ;;
        *) die "unknown argument: $1 (see --help)" ;;
    esac
    shift
done
requirements=$root/requirements/$set_name.txt

# ---- is there anything to do? ----------------------------------------------------------------------------------------
# The stamp: what is installed (the pins, pyproject.toml), and the code that installs it.
scripts=("${BASH_SOURCE[0]}" "$root/launch/_common.sh")
wanted=$(cat "$root/requirements/$set_name"*.txt "$root/pyproject.toml" "${scripts[@]}" | sha256sum | cut -d' ' -f1)
wanted="$set_name $wanted $root"
stamp=$venv/.megatron-gkd-stamp
if [[ -x $venv/bin/megatron-gkd && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    say "environment ready: $venv (nothing to do)"
    exit 0
fi

# ---- interpreter -----------------------------------------------------------------------------------------------------
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; }
python=
if [[ -x $venv/bin/python ]] && supported "$venv/bin/python"; then
    python=$venv/bin/python
else
    for candidate in ${GKD_PYTHON:+"$GKD_PYTHON"} python3.11 python3.12 python3; do
        if supported "$candidate"; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || die \
        "Python 3.11 or 3.12 is needed and was not found (looked for python3.11, python3.12, python3)." \
        "On Debian 12:  apt-get install python3 python3-venv      or name one:  GKD_PYTHON=/path/to/python3.11"
    if ! "$python" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        die "$python has no venv/ensurepip, so no environment can be made with it." \
            "On Debian:  apt-get install python3-venv      (for another version: python3.12-venv)"
    fi
    say "making $venv with $("$python" --version)"
    run "$python" -m venv "$venv"
fi

# ---- packages --------------------------------------------------------------------------------------------------------
# not compiled: Python compiles a module when it is first imported, and most of the 25,000 never are
pip=("$venv/bin/python" -m pip install --no-compile --no-input --disable-pip-version-check --progress-bar off --quiet)
read -r -a extra <<<"${GKD_PIP_ARGS:-}"
pip+=("${extra[@]}")
# torch alone, with its own dependencies at the pinned versions; then the complete set without the resolver
mapfile -t first < <(grep -E '^(torch|setuptools)==' "$requirements")
mapfile -t compiled < <(grep -E '^transformer_engine_torch==' "$requirements" || true)

install() {
    run "${pip[@]}" "$@" || die "the installer failed (see above); GKD_PIP_ARGS passes it extra arguments, see --help"
}

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
grep -E '^[A-Za-z]' "$requirements" | grep -vE '^transformer_engine_torch==' >"$temporary/pins"
other=$root/requirements/$set_name-py$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
if [[ -f $other ]]; then
    say "with the other versions of requirements/${other##*/}"
    grep -E '^[A-Za-z]' "$other" >"$temporary/other"
    # no package twice: where both files name one, the second's version
    cat "$temporary/other" "$temporary/pins" | awk -F== '!seen[$1]++' >"$temporary/both"
    mv "$temporary/both" "$temporary/pins"
fi
rest=$temporary/pins
if [[ $set_name == cpu ]]; then # what CUDA builds bring comes with torch, or not at all
    rest=$temporary/rest
    grep -vE '^(nvidia|cuda)-' "$temporary/pins" >"$rest"
fi
if $dry_run; then sed 's/^/pin: /' "$rest"; fi
say "installing ${first[*]} (the largest download)"
install --constraint "$temporary/pins" "${first[@]}"
say "installing $(wc -l <"$rest") pinned packages from requirements/$set_name.txt"
install --no-deps --no-build-isolation --requirement "$rest"
if ((${#compiled[@]})); then
    say "compiling ${compiled[*]} against the installed torch (minutes)"
    install --no-deps --no-build-isolation "${compiled[@]}"
fi
say "installing megatron-gkd itself (editable)"
exec {lock}<"$root/pyproject.toml"
flock "$lock" # another environment may be made at the same time, and both write into the checkout
install --no-deps --no-build-isolation --editable "$root"
$dry_run || printf '%s\n' "$wanted" >"$stamp"
say "environment ready: $venv"
