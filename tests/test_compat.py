"""tests/compat.sh, the suite's part for Python 3.12: what it names exists, and where it looks for an interpreter.

What it runs is its own: bash tests/compat.sh.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.effort import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests/compat.sh"


def named_tests() -> list[str]:
    return re.findall(r"^    \"?(tests/\S+\.py(?:::\w+)?)(?:\[\w+\])?\"?$", SCRIPT.read_text(), flags=re.M)


def test_every_test_that_it_names_exists() -> None:
    assert len(named_tests()) > 8
    for name in named_tests():
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in defined, name


def run(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """With a stand-in for setup_env.sh beside it, which says which interpreter it was given and fails."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "launch").mkdir()
    for name in ("tests/compat.sh", "launch/_common.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "launch/setup_env.sh").write_text('echo "with $GKD_PYTHON in $GKD_VENV"\nexit 7\n')
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GKD_", "PYENV"))}
    environment |= {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"} | variables
    return subprocess.run(
        ["bash", str(tmp_path / "tests/compat.sh")], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )


def interpreter(path: Path, *, runs: bool) -> str:
    """A file that says that it is Python 3.12, or one that fails as a pyenv shim without a version does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {0 if runs else 127}\n")
    path.chmod(0o755)
    return str(path)


def test_an_interpreter_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    interpreter(tmp_path / "bin/python3.12", runs=False)
    found = interpreter(tmp_path / ".pyenv/versions/3.12.9/bin/python3.12", runs=True)
    result = run(tmp_path)
    assert (result.returncode, result.stdout) == (7, f"with {found} in {tmp_path}/.venv/compat\n")


def test_without_one_it_says_so_in_one_line(tmp_path: Path) -> None:
    interpreter(tmp_path / "bin/python3.12", runs=False)
    result = run(tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("compat: SKIPPED, there is no Python 3.12")
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("runs", [True, False])
def test_an_interpreter_that_is_named_is_taken_or_refused(tmp_path: Path, runs: bool) -> None:
    named = interpreter(tmp_path / "mine", runs=runs)
    result = run(tmp_path, GKD_COMPAT_PYTHON=named)
    if runs:
        assert (result.returncode, result.stdout) == (7, f"with {named} in {tmp_path}/.venv/compat\n")
    else:
        assert result.returncode == 1
        assert f"GKD_COMPAT_PYTHON={named} is no Python 3.12" in result.stderr
