#!/usr/bin/env bash
# Set up the environment, then run the whole CPU test suite.
#
#   bash launch/run_tests.sh                       # everything; arguments go to pytest:
#   bash launch/run_tests.sh -m "not slow" -x      # the quick part, stop at the first failure
#   bash launch/run_tests.sh -n 0 tests/config/test_flags.py   # in one process
#
# Hardware: 2 CPU cores and 16 GB of memory; no GPU, no account. Tests that need a GPU are skipped.
# Time:     see docs/testing.md; the set-up takes minutes the first time and nothing after that.
# Expect:   pytest's closing line, "<n> passed", as the last line.
set -euo pipefail
# shellcheck source=_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

help_if_asked "$@"
bash "$root/launch/setup_env.sh"
bash "$root/tests/setup_swift.sh"
cd "$root"
# one thread per process: tests start several ranks, and threads that wait for each other cost more than they bring
export OMP_NUM_THREADS=1
export GKD_REQUIRE_SWIFT=1 # its tests fail, and do not skip themselves, where it is missing
# three workers for two cores: one of them often waits, for a server or for a time to be up
exec "$venv/bin/python" -m pytest -n 3 --durations 30 "$@"
