"""What tests of the scripts that start a server share."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from tests.support.effort import LIMIT_S

ROOT = Path(__file__).resolve().parent.parent.parent


class ServerScript:
    """A script in launch/, by its name, and the variables that it reads."""

    def __init__(self, name: str, *variables: str) -> None:
        self.path, self._variables = ROOT / "launch" / name, variables

    def environment(self, **values: object) -> dict[str, str]:
        """Of this process, with these of the script's variables alone."""
        kept = {name: value for name, value in os.environ.items() if name not in self._variables}
        return kept | {name: str(value) for name, value in values.items()}

    def run(self, *words: str, **values: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.path), *words],
            env=self.environment(**values),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT_S,
        )

    def dry(self, *words: str, **values: object) -> list[str]:
        """The words of the command."""
        result = self.run("--dry-run", *words, **values)
        assert result.returncode == 0, result.stderr
        return shlex.split(result.stdout.removeprefix("+ "))


def model_directory(root: Path) -> Path:
    """A directory that looks like a model's."""
    (root / "model").mkdir()
    (root / "model/config.json").write_text("{}")
    return root / "model"
