"""The shell scripts: syntax, lint, --help, --dry-run, and the rules that keep a run from being lost or repeated.

A stand-in for the environment (a directory with a `python` that prints its arguments) plays the interpreter, so nothing
is installed or trained here. The scripts that start training: test_launch_train.py. Not covered: a real set-up and a
real run; tests/test_quickstart.py and .ci/run do those.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.effort import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent
COMMON = ROOT / "launch/_common.sh"  # sourced, and no script by itself
DOCUMENTED = [
    *sorted(path for path in (ROOT / "launch").iterdir() if path != COMMON),
    ROOT / "tests/compat.sh",
    ROOT / "tests/setup_swift.sh",
    ROOT / "benchmarks/setup_trl.sh",
]
SCRIPTS = [*DOCUMENTED, ROOT / ".ci/run"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
Result = subprocess.CompletedProcess[str]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def bash(*args: str | Path, cwd: Path = ROOT, **env: str) -> Result:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GKD_")} | env
    return subprocess.run(
        ["bash", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=ids)
def test_syntax(script: Path):
    assert bash("-n", script).returncode == 0
    assert os.access(script, os.X_OK), f"chmod +x {script}"


@pytest.mark.parametrize("script", [COMMON, *SCRIPTS], ids=ids)
def test_lines_are_short(script: Path):
    assert [line for line in script.read_text().splitlines() if len(line) > 120] == []


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck():
    assert SHELLCHECK is not None
    result = subprocess.run([SHELLCHECK, *map(str, [COMMON, *SCRIPTS])], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", DOCUMENTED, ids=ids)
def test_help_is_the_header(script: Path, flag: str, tmp_path: Path):
    """Its own, from its first line of text to its last, wherever it is called; nothing is begun."""
    result = bash(script, flag, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = script.read_text().splitlines()
    header = [line[1:].removeprefix(" ") for line in lines[1 : lines.index("set -euo pipefail")]]
    assert result.stdout.splitlines() == [line for line in header if not line.startswith("SBATCH")]
    for heading in ("Hardware:", "Time:", "Expect:"):
        assert heading in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", DOCUMENTED, ids=ids)
def test_what_scripts_share_stands_in_one_file(script: Path):
    """A stage of a copy is a stage that drifts: every name that _common.sh defines is defined there alone."""
    shared = re.findall(r"^(\w+)\(\) ", COMMON.read_text(), flags=re.M)
    assert len(shared) > 20
    assert set(re.findall(r"^(\w+)\(\) ", script.read_text(), flags=re.M)).isdisjoint(shared)
    assert "_common.sh" in script.read_text()


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("launch/setup_env.sh", ["--gpus"], "setup_env: unknown argument: --gpus (see --help)"),
        ("tests/setup_swift.sh", ["--gpu"], "setup_swift: unknown argument: --gpu (see --help)"),
        ("launch/train_single_node.sh", ["--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_an_unknown_flag_is_refused(script: str, words: list[str], message: str, tmp_path: Path):
    """By the script, or by the program that it hands its flags to. Those of vLLM and pytest are theirs to refuse."""
    result = bash(ROOT / script, *words, cwd=tmp_path, GKD_VENV=sys.prefix, NPROC_PER_NODE="1")
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("changed", ["requirements/cpu.txt", "launch/setup_env.sh", "launch/_common.sh"])
def test_the_stamp_of_the_environment_covers_what_makes_it(changed: str, tmp_path: Path):
    """A stand-in for a finished environment is taken for one until a pin, or the code that installs it, changes."""
    for name in ("launch", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    venv = tmp_path / ".venv/bin"
    venv.mkdir(parents=True)
    for name in ("python", "megatron-gkd"):
        (venv / name).write_text("#!/bin/sh\n")
        (venv / name).chmod(0o755)
    setup = tmp_path / "launch/setup_env.sh"
    first = bash(setup, GKD_VENV=str(venv.parent))
    assert first.returncode == 0, first.stderr
    assert "installing" in first.stdout
    assert "nothing to do" in bash(setup, GKD_VENV=str(venv.parent)).stdout
    with (tmp_path / changed).open("a") as file:
        file.write("\n# another line\n")
    assert "installing" in bash(setup, GKD_VENV=str(venv.parent)).stdout


def test_quickstart_dry_run_shows_every_stage(tmp_path: Path):
    out = tmp_path / "run"
    result = bash(ROOT / "launch/quickstart.sh", "--dry-run", "--steps", "7", "--out", out, "--beta", "0.5")
    assert result.returncode == 0, result.stderr
    commands = [line for line in result.stdout.splitlines() if line.startswith("+ ")]
    order = ["setup_env.sh", "prepare_model.py", "prepare_data.py", "cut_student.py", "megatron_gkd train", "report"]
    assert [next(i for i, line in enumerate(commands) if name in line) for name in order] == list(range(6))
    train = commands[4]
    assert "--nproc-per-node 2" in train
    schedule = r"--lmbda stepwise\,0:0\,5:1 --eval_steps 4 --save_steps 4"  # four steps on the data, three on its own
    assert f"--save {out} --train_iters 7 {schedule} --beta 0.5" in train
    assert not out.exists()


def test_quickstart_offline_by_flag_and_by_environment(tmp_path: Path):
    script = ROOT / "launch/quickstart.sh"
    by_flag = bash(script, "--dry-run", "--offline", "--out", tmp_path / "run")
    by_env = bash(script, "--dry-run", "--out", tmp_path / "run", GKD_OFFLINE="1")
    assert by_flag.stdout == by_env.stdout
    assert "make_tiny.py" in by_flag.stdout
    assert "prepare_model.py" not in by_flag.stdout


def test_relative_paths_are_the_callers(tmp_path: Path):
    result = bash(ROOT / "launch/quickstart.sh", "--dry-run", "--out", "here", cwd=tmp_path, GKD_CACHE="store")
    assert f"--save {tmp_path}/here" in result.stdout
    assert f"--out {tmp_path}/store/quickstart/teacher" in result.stdout


@pytest.mark.parametrize(
    "arguments", [["--steps", "x"], ["--steps"], ["--out"], ["--steps=0"], ["--out", "--fresh"]], ids=" ".join
)
def test_quickstart_refuses(arguments: list[str]):
    result = bash(ROOT / "launch/quickstart.sh", "--dry-run", *arguments)
    assert result.returncode == 2
    assert "quickstart:" in result.stderr


# ---- a stand-in for the environment: what quickstart.sh does with the runs that it finds ---------------------------

PYTHON = """#!/usr/bin/env bash
printf 'python'; printf ' %s' "$@"; printf '\\n'
while (($#)); do case $1 in --save) out=$2 ;; esac; shift; done
[[ -n ${out:-} && ${FAKE_TRAIN:-finish} != fail ]] || exit "${FAKE_STATUS:-0}"
mkdir -p "$out/checkpoints" "$out/hf" "$out/report"
echo '{}' >"$out/metrics.jsonl"
echo step_00000001 >"$out/checkpoints/latest"
[[ ${FAKE_TRAIN:-finish} == interrupt ]] && { rmdir "$out/hf"; exit 9; }
echo '{}' >"$out/hf/config.json"
sleep 0.01
echo 'the report' >"$out/report/summary.txt"
"""


@pytest.fixture
def quickstart(tmp_path: Path) -> Callable[..., Result]:
    """launch/quickstart.sh of a copy of the repository's scripts, with the stand-in as interpreter."""
    root = tmp_path / "repo"
    for name in ("launch", "examples", "requirements"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "launch/setup_env.sh").write_text("echo environment ready\n")
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)

    def call(*args: str | Path, **env: str) -> Result:
        return bash(root / "launch/quickstart.sh", *args, cwd=tmp_path, GKD_VENV=str(tmp_path / "venv"), **env)

    return call


def trained(result: Result) -> bool:
    return " train " in result.stdout


def test_a_finished_run_is_not_repeated(quickstart: Callable[..., Result]):
    first = quickstart("--out", "run")
    assert first.returncode == 0, first.stderr
    assert trained(first)
    second = quickstart("--out", "run")
    assert second.returncode == 0, second.stderr
    assert not trained(second)
    assert "the report" in second.stdout
    assert trained(quickstart("--out", "run", "--fresh"))


def test_an_interrupted_run_goes_on_from_its_checkpoint(quickstart: Callable[..., Result], tmp_path: Path):
    first = quickstart("--out", "run", FAKE_TRAIN="interrupt")
    assert first.returncode == 9
    second = quickstart("--out", "run")
    assert second.returncode == 0
    assert f"--load {tmp_path / 'run'}" in second.stdout


def test_a_run_that_failed_before_its_first_step_does_not_block_the_next(quickstart: Callable[..., Result]):
    assert quickstart("--out", "run", "--beta", "7", FAKE_TRAIN="fail", FAKE_STATUS="2").returncode == 2
    second = quickstart("--out", "run", "--beta", "0.7")
    assert second.returncode == 0, second.stderr
    assert trained(second)
    assert "--load" not in second.stdout


def test_another_run_is_neither_overwritten_nor_taken_for_this_one(quickstart: Callable[..., Result], tmp_path: Path):
    assert quickstart("--out", "run").returncode == 0
    other = quickstart("--out", "run", "--steps", "3")
    assert other.returncode == 2
    assert "other settings" in other.stderr
    assert not trained(other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    for flags in ([], ["--fresh"]):
        foreign = quickstart("--out", "mine", *flags)
        assert foreign.returncode == 2
        assert "not made by this script" in foreign.stderr
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


def test_setup_env_is_instant_when_the_stamp_fits_and_works_otherwise(tmp_path: Path):
    script = ROOT / "launch/setup_env.sh"
    result = bash(script, "--dry-run", GKD_VENV=str(tmp_path / "venv"), GKD_PIP_ARGS="--index-url X --no-cache-dir")
    assert result.returncode == 0, result.stderr
    installs = [line for line in result.stdout.splitlines() if " pip install " in line]
    assert len(installs) == 3
    assert "torch==" in installs[0]
    assert "--no-deps" not in installs[0]
    assert "--requirement" in installs[1]
    assert "--editable" in installs[2]
    assert all("--index-url X --no-cache-dir" in line for line in installs)
    assert not (tmp_path / "venv").exists()


def test_setup_env_takes_other_versions_on_another_python(tmp_path: Path):
    python = tmp_path / "python3.12"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "import sys; sys.version_info = (3, 12, 1); $2"\n'
    )
    python.chmod(0o755)
    pins = {}
    for name, interpreter in (("3.11", sys.executable), ("3.12", str(python))):
        result = bash(
            ROOT / "launch/setup_env.sh", "--dry-run", GKD_VENV=str(tmp_path / "venv"), GKD_PYTHON=interpreter
        )
        assert result.returncode == 0, result.stderr
        lines = [line.removeprefix("pin: ") for line in result.stdout.splitlines() if line.startswith("pin: ")]
        pins[name] = dict(line.split("==") for line in lines)
        assert len(lines) == len(pins[name])
    added = pins["3.12"].keys() - pins["3.11"].keys()
    assert added == {"torchvision", "num2words"}, "for 3.11 the default index may have CUDA builds alone"
    changed = {name: (old, pins["3.12"][name]) for name, old in pins["3.11"].items() if pins["3.12"][name] != old}
    assert changed == {"megatron-core": ("0.16.1", "0.19.2")}


def test_setup_env_says_what_to_install(tmp_path: Path):
    result = bash(
        ROOT / "launch/setup_env.sh",
        GKD_VENV=str(tmp_path / "venv"),
        GKD_PYTHON=str(tmp_path / "no-python"),
        PATH=_path_without_python(tmp_path),
    )
    assert result.returncode == 1
    assert "Python 3.11 or 3.12 is needed" in result.stderr
    assert "apt-get install" in result.stderr


def _path_without_python(tmp_path: Path) -> str:
    """A directory with the few tools that the script uses before it looks for an interpreter."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "sha256sum", "dirname", "sed", "grep", "mktemp", "rm"):
        (tools / name).symlink_to(shutil.which(name) or name)
    return str(tools)


@pytest.mark.parametrize("name", ["cpu", "cpu-py312", "gpu", "swift"])
def test_requirement_files_pin_everything(name: str):
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin and "+" not in pin for pin in pins), [pin for pin in pins if "==" not in pin or "+" in pin]
    assert pins[0].startswith({"swift": "ms_swift==", "cpu-py312": "megatron-core=="}.get(name, "torch=="))
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
    if name == "cpu":
        assert not {"torchvision", "torchaudio", "torchcodec", "pycosat"} & set(names)
