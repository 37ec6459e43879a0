"""Keys that cannot be sent are refused before anything begins, by the command line and by the launch scripts, and shown
by neither. What servers do with a key: rollout/test_answers.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_gkd import cli
from tests.support.effort import LIMIT_S

ROOT = Path(cli.__file__).parent.parent
SERVER = ["--gkd_logits_topk", "4", "--lmbda", "0", "--teacher_model_server", "http://127.0.0.1:9"]
BAD = ["ses ame", "ses\rame", "ses\u00e4me", "ses\x1bame"]


@pytest.mark.parametrize("key", BAD)
@pytest.mark.parametrize("variable", ["TEACHER_API_KEY", "VLLM_API_KEY"])
def test_the_command_line_refuses_it(
    variable: str, key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(variable, key)
    (tmp_path / "S").mkdir()
    (tmp_path / "T").mkdir()
    flags = SERVER
    if variable == "VLLM_API_KEY":
        flags = ["--teacher_model", "T", "--lmbda", "1", "--vllm_mode", "server", "--vllm_server_host", "127.0.0.1"]
    assert cli.main(["train", "--model", "S", "--dataset", "d.jsonl", *flags]) == 2
    printed = "".join(capsys.readouterr())
    assert f"the key in the environment variable {variable} has a" in printed
    assert "ses" not in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("script", "variable"), [("teacher", "TEACHER_API_KEY"), ("rollout", "VLLM_API_KEY")])
def test_the_scripts_refuse_it(script: str, variable: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for key, code in [*((key, 2) for key in BAD), ("sesame!~", 0), ("", 0)]:
        environment = os.environ | {"MODEL": str(tmp_path), variable: key}
        done = subprocess.run(
            ["bash", str(ROOT / f"launch/{script}_server.sh"), "--dry-run"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "ses" not in done.stdout + done.stderr
        assert (variable in done.stderr) == (code == 2)
