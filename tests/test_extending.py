"""docs/extending.md: every change that it shows applies to this tree and does what it says.

All of them go into one copy of the package, where one process holds each to the truth (tests/support/extended.py).
Not covered: the words around them; the tests and tables that the page tells a contributor to add.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.effort import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
DIFFS = {
    section.split("\n")[0]: diffs
    for section in PAGE.split("\n## ")
    if (diffs := re.findall(r"^```diff\n(.*?)^```$", section, flags=re.S | re.M))
}
EXTENSIONS = ("A divergence", "A model family", "A sampling engine", "A command")
MOST_FILES = 4
PACKAGES = ("megatron_gkd", "tests/__init__.py", "tests/support")


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", diff, flags=re.M)


def copy_of(folder: Path, *names: str) -> Path:
    """Files and directories of this tree, compiled modules included: what is not changed is not compiled again."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        elif (ROOT / name).exists():  # a change may add a file
            shutil.copy2(ROOT / name, folder / name)
    return folder


def apply(diff: str, folder: Path, *options: str) -> str:
    """What git says against it; nothing where it applies."""
    done = subprocess.run(
        ["git", "apply", *options, "-"],
        input=diff, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
    )  # fmt: skip
    assert done.returncode == 0 or done.stderr, done
    return done.stderr


def test_each_extension_is_one_change_of_a_few_files():
    assert tuple(DIFFS) == EXTENSIONS
    for name, diffs in DIFFS.items():
        assert len(diffs) == 1, name
        assert 1 <= len(set(files_of(diffs[0]))) <= MOST_FILES, name


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each change applies by itself; all of them together run."""
    others = {file for (diff,) in DIFFS.values() for file in files_of(diff) if not file.startswith(PACKAGES)}
    folder = copy_of(tmp_path_factory.mktemp("extended"), *PACKAGES, *sorted(others))
    problems = {name: apply(diff, folder, "--check") for name, (diff,) in DIFFS.items()}
    assert problems == dict.fromkeys(EXTENSIONS, "")
    for diff, *_ in DIFFS.values():
        assert apply(diff, folder) == ""
    models = folder / "models"
    models.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.extended", str(models)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert Path(results.pop("package")).is_relative_to(folder), "another package was run"
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTENSIONS)
def test_the_change_does_what_it_says(found: dict[str, str], name: str):
    assert found[name] == "", found[name]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_change_that_has_grown_old_is_found(tmp_path: Path, name: str):
    (diff,) = DIFFS[name]
    (context,) = re.findall(r"^ (\w.*|  +\w.*)$", diff, flags=re.M)[:1]
    old = diff.replace(f"\n {context}\n", f"\n {context}  # as it was\n", 1)
    assert old != diff
    assert "does not apply" in apply(old, copy_of(tmp_path, *files_of(diff)), "--check")
