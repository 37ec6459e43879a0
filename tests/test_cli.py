"""The command line as a user meets it: texts, exit codes, ranks, what is imported.

Does not cover: what the commands do (tests of train/ and report.py) and the parsing of single flags
(config/test_flags.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import megatron_gkd
from megatron_gkd import cli
from megatron_gkd.config import environment
from megatron_gkd.config.run import RunConfig, flags
from megatron_gkd.errors import DataError
from tests.support.effort import LIMIT_S

ROOT = Path(megatron_gkd.__file__).parent.parent
TRAIN = ["train", "--model", "S", "--teacher_model", "T", "--dataset", "d.jsonl"]
TOP_0 = ["--gkd_logits_topk", "0"]
MISSING = ["--moe_z_loss_coeff", "0.1"]  # a flag that is not built


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models that TRAIN names, and no rank."""
    for name in ("S", "T"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("d.jsonl", "e.jsonl"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no name of a hub is asked for
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m megatron_gkd` in a process of its own."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    environment |= {"PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-m", "megatron_gkd", *argv]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def test_an_error_is_one_line_and_exit_code_2(run_dir: Path) -> None:
    done = run(*TRAIN, "--lmda", "0", cwd=run_dir)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "megatron-gkd: error: unknown flag --lmda; did you mean --lmbda?\n"


def test_what_is_not_built_is_one_line(run_dir: Path) -> None:
    done = run(*TRAIN, *MISSING, cwd=run_dir)
    assert done.returncode == 2
    assert done.stderr == ("megatron-gkd: error: not built yet: --moe_z_loss_coeff 0.1 (use --moe_aux_loss_coeff)\n")


def test_debug_adds_the_traceback(run_dir: Path) -> None:
    for words in (["--log_level", "debug"], ["--log-level=debug"]):
        done = run(*TRAIN, *MISSING, *words, cwd=run_dir)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("megatron-gkd: error: not built yet: --moe_z_loss_coeff")


def test_help_is_complete_and_imports_nothing_heavy(run_dir: Path) -> None:
    code = (
        "import sys\nfrom megatron_gkd.cli import main, prepare\n"
        f"prepare({[*TRAIN, '--lmbda', '0']})\n"
        "try:\n    main(['train', '--help'])\nfinally:\n"
        "    print('heavy:', sorted({'torch', 'transformers', 'megatron', 'numpy'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=run_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert "Distillation: divergence" in done.stdout
    for flag in flags():
        assert f"--{flag}" in done.stdout
    assert "([0, 1], default 0.5)" in " ".join(done.stdout.split())


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == megatron_gkd.__version__
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-gkd {megatron_gkd.__version__}\n"
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("train", "sample", "convert", "eval", "plan", "report", "check"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command; give one of train, sample"),
        (["trian"], "unknown command trian; did you mean train?"),
        (["--model", "S"], "unknown command --model; give one of"),
        (["sample", "--model", "T", "--dataset", "d.jsonl"], "--result_path is missing"),
        (["sample", "--model", "T", "--beta", "1"], "unknown flag --beta"),
        (["convert"], "--to is missing; Format that is written"),
        (["convert", "--to", "gguf"], "--to is gguf; it must be megatron|hf"),
        (["plan", "--model", "N"], "--model N: there is no such directory"),
        (["check"], "check alone is not a check; give `check teacher` or `check data`"),
        (["check", "data", "--model", "S"], "--dataset is missing; Data to be checked"),
        (["check", "data", "--model", "N", "--dataset", "d"], "--model N: there is no such directory"),
        (
            [*("check", "teacher", "--teacher_model", "T", "--teacher_model_server", "u", "--dataset", "d"), *TOP_0],
            "--gkd_logits_topk is 0; it must be > 0",
        ),
        (["check", "student"], "check student is not a check"),
        (["check", "data", "--model", "S", "--dataset", "x.jsonl"], "--dataset x.jsonl: there is no such file"),
        (["sample", "--model", "N", "--dataset", "d.jsonl", "--result_path", "r.jsonl"], "--model N: there is no such"),
        (
            ["sample", "--model", "S", "--dataset", "x", "--result_path", "r.jsonl"],
            "--dataset x: there is no such file",
        ),
        (["check", "teacher", "--teacher_model", "T"], "--teacher_model_server is missing; URL of the teacher"),
        (["eval", "--model", "S", "--teacher_model", "T"], "--eval_dataset is missing"),
        ([*TRAIN, "--beta", "2"], "--beta is 2.0; it must be in [0, 1]"),
        ([*TRAIN[:-1], "x.jsonl", "--lmbda", "0"], "--dataset x.jsonl: there is no such file or directory"),
        ([*TRAIN[:-1], "data/trian", "--lmbda", "0"], "--dataset data/trian: there is no such file or directory"),
        ([*TRAIN, "--eval_dataset", "Org/Name", "--lmbda", "0"], "--eval_dataset Org/Name: there is no such file"),
        (["train", "--model", "S/x", *TRAIN[3:], "--lmbda", "0"], "--model S/x: there is no such directory"),
        ([*TRAIN, "--model", ".", "--lmbda", "0"], "--model .: there is no config.json in it"),
        ([*TRAIN, "--save", "d.jsonl/run", "--lmbda", "0"], "--save d.jsonl/run: "),
        ([*TRAIN, "--load", "x", "--lmbda", "0"], "--load x: there is no such directory"),
        ([*TRAIN, "--learning_rate", "1"], "unknown flag --learning_rate; did you mean --lr?"),
        ([*TRAIN, "--per_device_train_batch_size", "1"], "unknown flag --per_device_train_batch_size; did you mean "),
        (["check", "train", *TRAIN[1:], "--lmbda", "0", "--world_size", "3"], "global_batch_size 16 is not a multiple"),
    ],
)
def test_errors(argv: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"megatron-gkd: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("env", "prints"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1"}, False),
    ],
)
def test_what_every_rank_would_say_is_said_once_per_machine(
    env: dict[str, str],
    prints: bool,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a silent rank stays until the launcher ends it, for at most a while: had it ended first, the launcher would
    have ended the speaker before its message."""
    waited: list[float] = []
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=waited.append))  # threads of other tests sleep too
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*TRAIN, *MISSING]) == 2
    err = capsys.readouterr().err
    assert err.startswith("megatron-gkd: error: not built yet") if prints else err == ""
    assert waited == ([] if prints else [cli.SILENT_RANK_WAITS_S])


def stub(monkeypatch: pytest.MonkeyPatch, module: str, **names: object) -> None:
    """Stands for a module of the package that the command would import."""
    replacement = ModuleType(module)
    vars(replacement).update(names)
    monkeypatch.setitem(sys.modules, module, replacement)


def test_train_and_eval_get_the_configuration(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, RunConfig]] = []
    stub(monkeypatch, "megatron_gkd.train.loop", run_training=lambda cfg: seen.append(("train", cfg)))
    stub(monkeypatch, "megatron_gkd.train.evaluate", run_evaluation=lambda cfg: seen.append(("eval", cfg)))
    assert cli.main([*TRAIN, "--lmbda", "0", "--beta", "0.25"]) == 0
    assert cli.main(["eval", "--model", "S", "--teacher_model", "T", "--eval_dataset", "e.jsonl"]) == 0
    assert [name for name, _ in seen] == ["train", "eval"]
    assert seen[0][1].distillation.beta == 0.25
    assert seen[1][1].data.eval_dataset == ["e.jsonl"]


def test_report_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stub(monkeypatch, "megatron_gkd.commands.report", main=seen.append)
    assert cli.main(["report", "runs/gkd", "--num_answers", "2"]) == 0
    assert seen == [["runs/gkd", "--num_answers", "2"]]


def fail(error: BaseException) -> object:
    def run_training(cfg: RunConfig) -> None:
        raise error

    return run_training


def test_a_failing_rank_says_its_number(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, "megatron_gkd.train.loop", run_training=fail(DataError("d.jsonl:3: bad\nrow")))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main([*TRAIN, "--lmbda", "0"]) == 2
    assert capsys.readouterr().err == "megatron-gkd: error: d.jsonl:3: bad row\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*TRAIN, "--lmbda", "0"]) == 2
    assert capsys.readouterr().err == "megatron-gkd: rank 1: error: d.jsonl:3: bad row\n"


def test_what_another_rank_says_as_well_is_said_once_per_machine(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, waited = DataError("d.jsonl:3: bad row"), list[float]()
    error.reported_elsewhere = True
    stub(monkeypatch, "megatron_gkd.train.loop", run_training=fail(error))
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=waited.append, time=lambda: 0))
    for rank, local_rank, said in (("1", "1", False), ("8", "0", True)):
        for name, value in dict(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE="16").items():
            monkeypatch.setenv(name, value)
        assert cli.main([*TRAIN, "--lmbda", "0"]) == 2
        assert capsys.readouterr().err == (f"megatron-gkd: rank {rank}: error: d.jsonl:3: bad row\n" if said else "")
    assert waited == [cli.SAME_MOMENT_S]


def test_an_earlier_run_is_found_before_anything_is_imported(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nobody is sent to a checkpoint that is not there."""
    save = run_dir / "run"
    save.mkdir()
    (save / "metrics.jsonl").write_text('{"step": 1}\n')
    command = [*TRAIN, "--lmbda", "0", "--save", str(save)]
    assert cli.main(command) == 2
    assert "begin it anew with --auto_resume true: it has saved no checkpoint" in capsys.readouterr().err
    (save / "checkpoints" / "step_00000001").mkdir(parents=True)
    (save / "checkpoints" / "step_00000001" / "manifest.json").write_text("{}")
    assert cli.main(command) == 2
    assert f"go on from step_00000001, the newest checkpoint, which is complete, with --load {save}" in (
        capsys.readouterr().err
    )


def test_a_launcher_is_told_the_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun reads it: its table of failed ranks is the last that is seen."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    error_file = run_dir / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    monkeypatch.setenv(environment.LAST_WORDS, str(run_dir))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert cli.main([*TRAIN, *MISSING]) == 2
    line = capsys.readouterr().err.strip()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(error_file))
    table = str(ChildFailedError("train", {0: failure})).splitlines()
    assert table[-2].endswith(line)
    assert line.startswith("megatron-gkd: error: not built yet")
    assert json.loads((run_dir / "0.json").read_text()) == {"text": line, "code": 2, "attempt": "3"}


def test_an_interrupt_is_no_traceback_and_other_errors_are(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "megatron_gkd.train.loop", run_training=fail(KeyboardInterrupt()))
    assert cli.main([*TRAIN, "--lmbda", "0"]) == 130
    stub(monkeypatch, "megatron_gkd.train.loop", run_training=fail(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main([*TRAIN, "--lmbda", "0"])
