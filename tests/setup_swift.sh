#!/usr/bin/env bash
# Make the environment of the tests that run ms-swift's server: .venv/swift, requirements/swift.txt on top of .venv.
#
#   bash tests/setup_swift.sh        # launch/run_tests.sh calls it after launch/setup_env.sh
#
# Hardware: as setup_env.sh; 200 MB of disk.
# Time:     about 15 seconds, 22 MB of download; a second run compares a stamp and returns at once.
# Expect:   no output.
#
# Environment: GKD_VENV and GKD_PIP_ARGS, as setup_env.sh
set -euo pipefail
# shellcheck source=../launch/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/_common.sh"

help_if_asked "$@"
(($# == 0)) || die "unknown argument: $1 (see --help)"
requirements=$root/requirements/swift.txt
stamp=$venv/swift/.stamp
wanted=$(cat "$requirements" "${BASH_SOURCE[0]}" "$root/launch/_common.sh" | sha256sum | cut -d' ' -f1)
[[ ! -f $stamp || $(<"$stamp") != "$wanted" ]] || exit 0

"$venv/bin/python" -m venv --clear --without-pip "$venv/swift"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$venv/swift/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\n' "$packages" >"$own/project.pth"
read -r -a extra <<<"${GKD_PIP_ARGS:-}"
"$venv/bin/python" -m pip --python "$venv/swift/bin/python" install --no-input --disable-pip-version-check \
    --progress-bar off --quiet "${extra[@]}" --no-deps --requirement "$requirements"
printf '%s\n' "$wanted" >"$stamp"
