"""The command line as a user runs it: torchrun on tiny checkpoints, then eval, report and resume; and bad inputs.

Three runs in different layouts. Afterwards each exported student, evaluated by one plain process, must give the
numbers of its run's last evaluation; and its negative log-likelihood must be transformers'. Bad inputs must end with
exit code 2 and one line that says what was given and what is needed, on every rank, without a rank that waits for
another.

The quick start's script is run in tests/test_quickstart.py. Not covered: CUDA, several machines.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import LIMIT_S
from tests.support.launched import forked_ranks
from tests.support.program import TORCHRUN, run
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
NUM_TRAIN, NUM_HELD_OUT = 24, 7
STEPS, BATCH = 8, 8


@dataclass(frozen=True)
class Inputs:
    """Directories and files that the runs share."""

    student: Path
    teacher: Path
    train: Path
    held_out: Path
    root: Path

    def flags(self, save: Path, changes: str = "") -> list[str]:
        """Flags of a complete run, with some changed or added; a flag that a change names is given once."""
        flags = f"""
            --model {self.student} --teacher_model {self.teacher} --dataset {self.train} --eval_dataset {self.held_out}
            --save {save} --lmbda 0 --train_iters {STEPS} --global_batch_size {BATCH} --micro_batch_size 2
            --lr 1e-2 --lr_decay_style constant --max_length 64 --device cpu {changes}"""
        words = flags.split()
        return [word for pair in dict(zip(words[::2], words[1::2], strict=True)).items() for word in pair]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tied Qwen3 student of 4 layers, an untied Llama teacher with another vocabulary padding, short sums as data."""
    root = tmp_path_factory.mktemp("inputs")
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, vocab_size=300, layers=4, seed=1)
    teacher = write_tiny_checkpoint(root / "teacher", "llama", tied=False, vocab_size=384, layers=4, seed=2)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{a * 7 % 11}?"},
                {"role": "assistant", "content": "x" * (a % 5)},
            ]
        }
        for a in range(NUM_TRAIN + NUM_HELD_OUT)
    ]
    return Inputs(
        student,
        teacher,
        write_rows(root / "train.jsonl", rows[:NUM_TRAIN]),
        write_rows(root / "held_out.jsonl", rows[NUM_TRAIN:]),
        root,
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- commands --------------------------------------------------------------------------------------------------------


def torchrun(args: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`megatron-gkd ARGS` on two ranks, as a user starts it. A hang is a TimeoutExpired."""
    environment |= {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "megatron_gkd",
            *args,
        ],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=LIMIT_S,
        check=False,
    )


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    return result.stdout


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- three runs ------------------------------------------------------------------------------------------------------

RUNS = {
    "PP2": "--pipeline_model_parallel_size 2 --save_steps 4 --sft_alpha 0.2",
    "TP2-SP-topk": (
        "--tensor_model_parallel_size 2 --sequence_parallel true --beta 0 --gkd_logits_topk 16 --eval_steps 3 "
        "--teacher_tensor_model_parallel_size 1 --teacher_pipeline_model_parallel_size 2 --save_steps 100"
    ),
    "DP2-packing": (
        "--packing true --use_distributed_optimizer true --beta 1 --teacher_tensor_model_parallel_size 2 "
        "--save_total_limit 1 --save_steps 2"
    ),
}
SAVED = {"PP2": [4, 8], "TP2-SP-topk": [8], "DP2-packing": [8]}


@pytest.fixture(scope="module")
def runs(inputs: Inputs) -> dict[str, Path]:
    """Run directories by name; one by torchrun (whose ranks are its own in test_launch_ranks.py)."""
    found = {}
    for name, flags in RUNS.items():
        found[name] = inputs.root / "runs" / name
        argv = ["train", *inputs.flags(found[name], flags)]
        with forked_ranks() as environment:
            succeeded(torchrun(argv, **environment) if name == "PP2" else run(argv, world=2))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_its_record(runs: dict[str, Path], name: str):
    run_dir = runs[name]
    metrics = records(run_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    for row in metrics:
        assert all(isinstance(value, int | float) and value == value for value in row.values())
        assert row["source/dataset/num_samples"] == BATCH
        assert row["grad_norm"] > 0
        assert row["lr"] > 0
    assert [row["consumed_samples"] for row in metrics] == [BATCH * step for step in range(1, STEPS + 1)]
    evaluations = records(run_dir / "evaluation.jsonl")
    assert [row["step"] for row in evaluations] == ([0, 3, 6, 8] if "topk" in name else [0, 8])
    assert evaluations[-1]["forward_kl"] < evaluations[0]["forward_kl"]
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    saved = sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))
    assert saved == SAVED[name]
    assert (run_dir / "checkpoints/latest").read_text().strip() == f"step_{STEPS:08d}"
    assert (run_dir / "config.yaml").is_file()
    assert list((run_dir / "tensorboard").glob("events.*"))
    assert ("teacher_mass" in metrics[0]) == ("topk" in name)
    assert ("cross_entropy" in metrics[0]) == (name == "PP2")
    # Top-K signals go from the teacher's last stage to both tensor ranks, so half of them travel: K * 8 bytes a token.
    # In the other layouts each rank that needs a signal has computed it.
    assert [row["signal_bytes"] / row["num_tokens"] for row in metrics] == [16 * 8 * ("topk" in name)] * STEPS


def evaluated(text: str) -> dict[str, float]:
    """The printed table of `eval`."""
    return {name: float(value) for name, value in (line.split() for line in text.splitlines() if line.strip())}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_eval_of_the_exported_student_repeats_the_last_evaluation(inputs: Inputs, runs: dict[str, Path], name: str):
    """In one plain process, though the runs were of two ranks."""
    flags = ["--model", str(runs[name] / "hf"), "--teacher_model", str(inputs.teacher)]
    flags += ["--eval_dataset", str(inputs.held_out), "--max_length", "64", "--device", "cpu"]
    flags += ["--lmbda", "0", *(["--gkd_logits_topk", "16"] if "topk" in name else [])]
    found = evaluated(succeeded(run(["eval", *flags])))
    expected = records(runs[name] / "evaluation.jsonl")[-1]
    assert found.keys() == expected.keys() - {"step"}
    assert found == pytest.approx({key: expected[key] for key in found}, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_transformers_finds_the_same_likelihood_in_the_exported_student(
    inputs: Inputs, runs: dict[str, Path], name: str
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_gkd.data.rows import load_rows

    model = AutoModelForCausalLM.from_pretrained(runs[name] / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs[name] / "hf")
    rows = load_rows([str(inputs.held_out)], tokenizer, max_length=64, on_bad_row="stop", overlong="drop")
    total, count = 0.0, 0
    for index in range(len(rows)):
        prompt, completion = rows[index].prompt_ids, rows[index].completion_ids
        assert completion is not None
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()
        count += len(completion)
    last = records(runs[name] / "evaluation.jsonl")[-1]
    assert last["num_tokens"] == count
    assert last["nll"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_report_writes_its_files(runs: dict[str, Path]):
    text = succeeded(run(["report", str(runs["PP2"]), "--max_new_tokens", "4"]))
    assert "forward KL" in text
    report = runs["PP2"] / "report"
    assert "forward KL" in (report / "summary.txt").read_text()
    summary = json.loads((report / "summary.json").read_text())
    evaluations = records(runs["PP2"] / "evaluation.jsonl")
    assert summary["before"]["forward_kl"] == pytest.approx(evaluations[0]["forward_kl"])
    assert summary["after"]["forward_kl"] == pytest.approx(evaluations[-1]["forward_kl"])
    assert (report / "curve.png").stat().st_size > 10_000


# ---- resume ----------------------------------------------------------------------------------------------------------

TIMES = ("tokens_per_s", "step_time_s", "step_cpu_s", "plan_s", "teacher_s", "student_s", "other_s")


@pytest.mark.slow
def test_pitfall_17_load_goes_on_where_the_run_stopped(inputs: Inputs, runs: dict[str, Path]):
    """A run that lost everything after its checkpoint of step 4 ends with the same numbers and the same bits."""
    stopped = inputs.root / "runs" / "stopped"
    shutil.copytree(runs["PP2"], stopped)
    shutil.rmtree(stopped / "hf")
    shutil.rmtree(stopped / "checkpoints/step_00000008")
    (stopped / "checkpoints/latest").write_text("step_00000004")
    result = run(["train", *inputs.flags(stopped, f"{RUNS['PP2']} --load {stopped}")], world=2)
    succeeded(result)
    assert "resumed" in result.stderr
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        found, expected = (
            [{k: v for k, v in row.items() if k not in TIMES} for row in records(run_dir / file)]
            for run_dir in (stopped, runs["PP2"])
        )
        assert found == expected
    whole, resumed = ((run_dir / "hf/model.safetensors").read_bytes() for run_dir in (runs["PP2"], stopped))
    assert whole == resumed


# ---- bad inputs ------------------------------------------------------------------------------------------------------


@contextmanager
def as_torchrun_starts_it() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """The environment of a rank of torchrun whose process group exists already; its output; everything undone."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_gkd import platform

    rank = str(dist.get_rank())
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield out, err
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if platform._undo is not None:
            platform._undo()
        get_cuda_rng_tracker().reset()


def main_on_a_rank(argv: list[str]) -> tuple[int, list[str]]:
    """Exit code, and the lines on stderr that are neither progress nor log messages."""
    from megatron_gkd import cli

    cli.SILENT_RANK_WAITS_S = 0.0  # there is no launcher that would end it
    with as_torchrun_starts_it() as (_, err):
        code = cli.main([*argv, "--log_level", "error"])
    return code, err.getvalue().splitlines()


def another_tokenizer(path: Path, inputs: Inputs) -> Path:
    """The teacher with two tokens exchanged."""
    shutil.copytree(inputs.teacher, path)
    text = (path / "tokenizer.json").read_text()
    vocabulary = json.loads(text)
    tokens = vocabulary["model"]["vocab"]
    tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
    (path / "tokenizer.json").write_text(json.dumps(vocabulary))
    return path


def truncated(path: Path, inputs: Inputs) -> Path:
    shutil.copytree(inputs.teacher, path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return path


def used_before(path: Path) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return path


@dataclass(frozen=True)
class Bad:
    """Flags that overrule those of a good run, the ranks, and what the line must say."""

    flags: str
    message: str
    ranks: int = 2


BAD = {
    "layout": Bad(
        "--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2",
        "the student's layout needs a multiple of tp 2 x cp 1 x pp 2 = 4 ranks, but it has 2",
    ),
    "teacher's layout": Bad(
        "--teacher_pipeline_model_parallel_size 4", "the teacher's layout needs a multiple of tp 1 x cp 1 x pp 4 = 4"
    ),
    "heads": Bad("--tensor_model_parallel_size 3", "3", ranks=3),
    "layers": Bad("--pipeline_model_parallel_size 3", "3", ranks=3),
    "batch": Bad("--global_batch_size 6", "global_batch_size 6 is not a multiple of data parallel size 2 x"),
    "packed batch": Bad("--packing true --global_batch_size 1", "global_batch_size 1 cannot be packed for 2"),
    "tokenizers": Bad("--teacher_model {other_tokenizer}", "tokenizer"),
    "no data set": Bad("--dataset {root}/missing.jsonl", "missing.jsonl"),
    "malformed row": Bad("--dataset {malformed}", "malformed.jsonl:2"),
    "no completions": Bad("--dataset {prompts}", "completion"),
    "held-out rows without completions": Bad("--eval_dataset {prompts}", "completion"),
    "nothing fits": Bad("--max_length 3", "no usable row in"),
    "used before": Bad("--save {used}", "holds an earlier run; give another --save"),
    "no model": Bad("--model {root}/no-model", "no-model"),
    "damaged weights": Bad("--teacher_model {truncated}", "model.safetensors"),
    "nothing to resume": Bad("--load {root}", "no complete checkpoint"),
    "top K": Bad("--gkd_logits_topk 301", "--gkd_logits_topk 301 is more than the 300 tokens that both models have"),
    "beta": Bad("--beta 1.5", "beta"),
    "not built": Bad("--moe_z_loss_coeff 0.1", "not built yet: --moe_z_loss_coeff 0.1"),
    "no room to sample": Bad(
        "--lmbda 0.5", "--max_completion_length 512 (its default) leaves no room for a prompt in --max_length 64"
    ),
    "unknown flag": Bad("--bta 0.5", "--bta"),
}


@pytest.fixture(scope="module")
def bad_paths(inputs: Inputs) -> dict[str, Path]:
    root = inputs.root / "bad"
    root.mkdir()
    good = inputs.train.read_text().splitlines()
    malformed = root / "malformed.jsonl"
    malformed.write_text(f'{good[0]}\n{{"messages": "text"}}\n')
    prompts = write_rows(root / "prompts.jsonl", [{"prompt": "1+1?"}] * BATCH)
    return {
        "root": root,
        "malformed": malformed,
        "prompts": prompts,
        "other_tokenizer": another_tokenizer(root / "other", inputs),
        "truncated": truncated(root / "truncated", inputs),
        "used": used_before(root / "used"),
    }


def bad_arguments(inputs: Inputs, paths: dict[str, Path], bad: Bad, save: Path) -> list[str]:
    return ["train", *inputs.flags(save, bad.flags.format(**paths))]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_exit_code_2_and_one_clear_line(
    inputs: Inputs, bad_paths: dict[str, Path], tmp_path: Path, name: str
):
    """On every rank, so that none waits for another; and before anything is written."""
    bad, save = BAD[name], tmp_path / "run"
    ranks = run_ranks(main_on_a_rank, bad_arguments(inputs, bad_paths, bad, save), world=bad.ranks)
    spoken = [lines for _, lines in ranks if lines]
    assert spoken
    for code, lines in ranks:
        assert code == 2, lines
    for lines in spoken:
        assert len(lines) == 1, lines
        assert lines[0].startswith("megatron-gkd: ")
        assert "error: " in lines[0]
        assert bad.message in lines[0]
        assert "Traceback" not in lines[0]
    assert len({line.split("error: ")[1] for lines in spoken for line in lines}) == 1, (
        "the ranks tell different stories"
    )
    assert not save.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch", "unknown flag"])
def test_bad_input_under_torchrun(inputs: Inputs, bad_paths: dict[str, Path], tmp_path: Path, name: str):
    """Found after the ranks have met, and before: torchrun ends and reports exit code 2 of a rank."""
    with forked_ranks() as environment:
        result = torchrun(bad_arguments(inputs, bad_paths, BAD[name], tmp_path), **environment)
    assert result.returncode != 0
    assert "exitcode  : 2" in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("megatron-gkd: ")]
    assert lines
    assert all(BAD[name].message in line for line in lines)
    assert BAD[name].message in result.stderr.split("Root Cause")[1], "the table that ends the screen has the line"


def test_bad_input_in_one_plain_process(inputs: Inputs, tmp_path: Path):
    result = run(["train", *inputs.flags(tmp_path, "--global_batch_size 7")])
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("megatron-gkd: error: global_batch_size 7 is not a multiple of data parallel size 1 x")
    assert "Traceback" not in result.stderr
