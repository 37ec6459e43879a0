#!/usr/bin/env bash
# Make the environment of the benchmark against TRL: requirements/trl.txt on top of the project's environment.
#
#   bash benchmarks/setup_trl.sh     # benchmarks/bench_end_to_end.py calls it; prints the interpreter
#
# Hardware: as setup_env.sh; 200 MB of disk.
# Time:     about 15 seconds, 20 MB of download; a second run compares a stamp and returns at once.
# Expect:   one line: the path of the environment's python.
#
# Environment: GKD_VENV and GKD_PIP_ARGS, as setup_env.sh; GKD_TRL_VENV (default: trl in GKD_VENV)
set -euo pipefail
# shellcheck source=../launch/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/_common.sh"

help_if_asked "$@"
(($# == 0)) || die "unknown argument: $1 (see --help)"
requirements=$root/requirements/trl.txt
own=${GKD_TRL_VENV:-$venv/trl}
stamp=$own/.stamp
wanted=$(cat "$requirements" "${BASH_SOURCE[0]}" "$root/launch/_common.sh" | sha256sum | cut -d' ' -f1)
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    "$venv/bin/python" -m venv --clear --without-pip "$own"
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    site=$("$own/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$packages" >"$site/project.pth"
    read -r -a extra <<<"${GKD_PIP_ARGS:-}"
    "$venv/bin/python" -m pip --python "$own/bin/python" install --no-input --disable-pip-version-check \
        --progress-bar off --quiet "${extra[@]}" --no-deps --requirement "$requirements"
    printf '%s\n' "$wanted" >"$stamp"
fi
printf '%s\n' "$own/bin/python"
