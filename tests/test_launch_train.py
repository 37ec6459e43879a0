"""The scripts that start training: what they would run, what they refuse, and that their flags are the program's.

Nothing is started here but the scripts themselves; test_launch_ranks.py starts real ranks. Not covered: Slurm itself
(the batch script meets stand-ins for its commands), GPUs, the hardware of the recipes.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_gkd.config.checks import CheckTrainConfig
from megatron_gkd.config.flags import parse_beside_train, parse_run_config, parse_section
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.errors import LayoutError
from megatron_gkd.train.preflight import run_preflight
from tests.support.effort import LIMIT_S
from tests.test_launch import ROOT, Result, bash

SINGLE, MULTI, SLURM = "train_single_node.sh", "train_multi_node.sh", "slurm.sbatch"
RECIPES = ("qwen2.5_72b_to_7b.sh", "on_policy_distillation.sh")
LEFT_OVER = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ENDPOINT", "CUDA_VISIBLE_DEVICES")
CLEAN = {"GKD_VENV": "", "CUDA_VISIBLE_DEVICES": ""}  # the environment: a stand-in (below), or sys.prefix
REAL = {"GKD_VENV": sys.prefix}
SIZES = {"TEACHER": (8192, 64, 8, 80, 29568), "STUDENT": (3584, 28, 4, 28, 18944)}  # Qwen2.5 of 72B and of 7B
C10D = {"NNODES": "2", "RDZV_ENDPOINT": "node0"}
STATIC = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}


@pytest.fixture(autouse=True)
def _no_variables_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LEFT_OVER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def _stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An interpreter that finds nothing wrong, for the tests of what the scripts themselves say."""
    root = tmp_path_factory.mktemp("venv")
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text("#!/bin/sh\n")
    (root / "bin" / "python").chmod(0o755)
    CLEAN["GKD_VENV"] = str(root)
    yield
    CLEAN["GKD_VENV"] = ""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The models of the recipe, of which only config.json is looked at, and a data set."""
    root = tmp_path_factory.mktemp("given")
    for name, (hidden, heads, kv_heads, layers, ffn) in SIZES.items():
        (root / name).mkdir()
        config = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads)
        config |= dict(num_hidden_layers=layers, intermediate_size=ffn, vocab_size=152064, rms_norm_eps=1e-6)
        config |= dict(model_type="qwen2", max_position_embeddings=32768, tie_word_embeddings=False)
        config |= dict(architectures=["Qwen2ForCausalLM"], hidden_act="silu")
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "rows.jsonl").write_text("{}\n")
    return {
        "TEACHER": str(root / "TEACHER"),
        "STUDENT": str(root / "STUDENT"),
        "DATASET": str(root / "rows.jsonl"),
        "RESULT": str(root / "teacher.jsonl"),
    }


def launch(script: str, *args: str, **env: str) -> Result:
    return bash(ROOT / "launch" / script, *args, **CLEAN | env)


def words(result: Result) -> list[str]:
    """The command that a dry run prints, environment included."""
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("+ ")]
    assert len(lines) == 1, result.stdout
    return shlex.split(lines[0])[1:]


def has(command: list[str], *part: str) -> bool:
    return any(tuple(command[i : i + len(part)]) == part for i in range(len(command)))


def config_of(command: list[str]) -> RunConfig:
    """The flags behind `megatron_gkd train`, parsed and checked as the program does."""
    config = parse_run_config(command[command.index("train") + 1 :])
    config.validate("train")
    return config


# ---- one node and several --------------------------------------------------------------------------------------------


def test_single_node_command():
    command = words(launch(SINGLE, "--dry-run", "--model", "a b", "--lr", "1e-4"))
    assert has(command, "--standalone", "--nproc-per-node", "1", "--max-restarts", "3", "-m", "megatron_gkd", "train")
    assert command[-6:] == ["--auto_resume", "true", "--model", "a b", "--lr", "1e-4"]
    assert {"OMP_NUM_THREADS=1", "CUDA_DEVICE_MAX_CONNECTIONS=1"} < set(command)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in command, "restarts need it"


def test_single_node_environment():
    env = dict(NPROC_PER_NODE="4", MAX_RESTARTS="0", AUTO_RESUME="0", OMP_NUM_THREADS="3")
    command = words(launch(SINGLE, "--dry-run", "--model", "m", **env))
    assert has(command, "--nproc-per-node", "4", "--max-restarts", "0")
    assert "--auto_resume" not in command
    assert "OMP_NUM_THREADS=3" in command


@pytest.mark.parametrize(("visible", "ranks"), [("0,1,2", "3"), ("5", "1"), ("", "1")])
@pytest.mark.parametrize(("script", "env"), [(SINGLE, {}), (MULTI, C10D)])
def test_one_rank_for_each_visible_gpu(script: str, env: dict[str, str], visible: str, ranks: str):
    command = words(launch(script, "--dry-run", "--model", "m", **env, CUDA_VISIBLE_DEVICES=visible))
    assert has(command, "--nproc-per-node", ranks)


def test_c10d_command():
    env = C10D | dict(RDZV_ENDPOINT="10.0.0.7:29500", LOCAL_ADDR="10.0.0.7")
    command = words(launch(MULTI, "--dry-run", "--model", "m", **env))
    assert has(command, "--rdzv-conf", "join_timeout=900,is_host=1")
    env = C10D | dict(LOCAL_ADDR="10.0.0.7", RDZV_ID="job7", RDZV_TIMEOUT_S="60", RDZV_CONF="is_host=1")
    command = words(launch(MULTI, "--dry-run", "--model", "m", **env))
    assert has(command, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3")
    assert has(command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500", "--rdzv-id", "job7")
    assert has(command, "--rdzv-conf", "join_timeout=60,is_host=1", "--local-addr", "10.0.0.7", "-m", "megatron_gkd")
    assert has(command, "train", "--auto_resume", "true", "--model", "m")


def test_static_command():
    command = words(launch(MULTI, "--dry-run", "--model", "m", **STATIC, MASTER_PORT="1234"))
    assert has(command, "--max-restarts", "0", "--node-rank", "1", "--master-addr", "node0", "--master-port", "1234")
    assert "--rdzv-backend" not in command


@pytest.mark.parametrize(
    ("script", "env", "message"),
    [
        (SINGLE, dict(NPROC_PER_NODE="two"), "NPROC_PER_NODE=two: give a positive whole number"),
        (SINGLE, dict(NPROC_PER_NODE="0"), "NPROC_PER_NODE=0"),
        (SINGLE, dict(MAX_RESTARTS="-1"), "MAX_RESTARTS=-1: give 0 or a positive"),
        (SINGLE, dict(AUTO_RESUME="maybe"), "AUTO_RESUME=maybe: give 0 or 1"),
        (SINGLE, dict(GKD_VENV="/nowhere"), "there is no /nowhere/bin/python; bash launch/setup_env.sh"),
        (MULTI, dict(RDZV_ENDPOINT="node0"), "NNODES is not set"),
        (MULTI, dict(NNODES="2"), "neither RDZV_ENDPOINT nor MASTER_ADDR is set"),
        (MULTI, C10D | dict(NNODES="1:4"), "NNODES=1:4: the number of nodes is fixed"),
        (MULTI, C10D | dict(NNODES="x"), "NNODES=x"),
        (MULTI, C10D | dict(RDZV_ENDPOINT="node0:99999"), "RDZV_ENDPOINT=node0:99999: give HOST or HOST:PORT"),
        (MULTI, C10D | dict(RDZV_ENDPOINT=":29500"), "give HOST or HOST:PORT, with a host"),
        (MULTI, C10D | dict(RDZV_ENDPOINT="tcp://node0:29500"), "give HOST or HOST:PORT, without tcp://"),
        (MULTI, C10D | dict(RDZV_ENDPOINT="fd00::1"), "put an IPv6 address in brackets, [ADDRESS] or [ADDRESS]:PORT"),
        (MULTI, C10D | dict(RDZV_ENDPOINT="[fd00::1"), "give an IPv6 address as [ADDRESS] or [ADDRESS]:PORT"),
        (MULTI, C10D | dict(RDZV_ENDPOINT="[fd00::1]:0"), "with a port from 1 to 65535"),
        (MULTI, C10D | dict(RDZV_TIMEOUT_S="soon"), "RDZV_TIMEOUT_S=soon"),
        (MULTI, C10D | dict(MAX_RESTARTS="x"), "MAX_RESTARTS=x"),
        (MULTI, C10D | dict(AUTO_RESUME="2"), "AUTO_RESUME=2"),
        (MULTI, C10D | STATIC, "unset one of them"),
        (MULTI, STATIC | dict(NODE_RANK="2"), "give a number from 0 to 1"),
        (MULTI, dict(NNODES="2", MASTER_ADDR="node0"), "NODE_RANK=: give the number of this node"),
        (MULTI, STATIC | dict(MASTER_PORT="0"), "MASTER_PORT=0"),
        (MULTI, STATIC | dict(MAX_RESTARTS="1"), "give RDZV_ENDPOINT instead"),
    ],
)
def test_refused(script: str, env: dict[str, str], message: str):
    result = launch(script, "--dry-run", "--model", "m", **env)
    assert result.returncode == 2
    assert f"{script.removesuffix('.sh')}: " in result.stderr
    assert message in result.stderr


@pytest.mark.parametrize(("script", "env"), [(SINGLE, {}), (MULTI, C10D)])
def test_a_run_without_flags_is_refused(script: str, env: dict[str, str]):
    result = launch(script, "--dry-run", **env)
    assert result.returncode == 2
    assert "no flags for `megatron-gkd train`" in result.stderr


def test_no_script_ends_processes():
    for script in (ROOT / "launch").iterdir():
        text = script.read_text()
        assert "pkill" not in text and "killall" not in text and "scancel" not in text, script  # noqa: PT018


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_72b_to_7b_on_nodes_of_its_own(given: dict[str, str]):
    command = words(launch(RECIPES[0], "--dry-run", "--lr", "3e-6", "--train_iters", "5", **given | C10D))
    assert has(command, "--nnodes", "2")
    config = config_of(command)
    assert (config.parallel.tensor_model_parallel_size, config.teacher.teacher_tensor_model_parallel_size) == (2, 8)
    assert (config.teacher.teacher_placement, config.teacher.teacher_nodes) == ("separate", 1)
    assert config.distillation.gkd_logits_topk is None, "hidden states, not a top K"
    assert config.distillation.fuse_loss
    assert (config.training.lr, config.training.train_iters) == (3e-6, 5), "the caller's flags win"
    assert config.checkpoint.auto_resume


def test_72b_to_7b_on_the_same_gpus(given: dict[str, str]):
    command = words(launch(RECIPES[0], "--dry-run", **given, PLACEMENT="colocate", NPROC_PER_NODE="8"))
    assert has(command, "--standalone", "--nproc-per-node", "8")
    config = config_of(command)
    assert config.teacher.teacher_placement == "colocate"
    assert config.teacher.offload_teacher_model


def test_on_policy(given: dict[str, str]):
    pytest.importorskip("vllm")
    config = config_of(words(launch(RECIPES[1], "--dry-run", **given, VLLM_MEMORY=".25", SAVE="runs/x")))
    assert (config.distillation.lmbda, config.distillation.beta) == (1.0, 1.0)
    assert config.sampling.vllm_gpu_memory_utilization == 0.25
    assert config.checkpoint.save == "runs/x"
    assert "--nnodes" in words(launch(RECIPES[1], "--dry-run", **given | C10D))


def test_presampling_and_the_training_that_follows(given: dict[str, str]):
    result = launch("presample_teacher.sh", "--dry-run", "--temperature", "0.7", **given, TP="4", DTYPE="fp32")
    assert result.returncode == 0, result.stderr
    sample, train = (shlex.split(line)[1:] for line in result.stdout.splitlines())
    settings = parse_section(sample[sample.index("sample") + 1 :], SampleConfig, command="sample")
    settings.check()
    assert (settings.temperature, settings.dtype, settings.vllm_tensor_parallel_size) == (0.7, "fp32", 4)
    assert settings.result_path == given["RESULT"]
    assert not Path(given["RESULT"]).exists()
    config = config_of(words(bash(*train[1:], "--dry-run", **CLEAN)))
    assert config.data.dataset == [given["RESULT"]]
    assert (config.distillation.lmbda, config.distillation.seq_kd) == (0.0, False)


@pytest.mark.parametrize(
    ("script", "env", "message"),
    [
        *((name, dict(TEACHER=""), "TEACHER is not set") for name in (*RECIPES, "presample_teacher.sh")),
        *((name, dict(TEACHER="/no"), "TEACHER=/no: there is no config.json") for name in RECIPES),
        *((name, dict(DATASET="/no.jsonl"), "DATASET=/no.jsonl: there is no such") for name in RECIPES),
        (RECIPES[0], {}, "PLACEMENT=separate with NNODES=1 and TEACHER_NODES=1 leaves no node for the student"),
        (RECIPES[0], dict(PLACEMENT="beside"), "PLACEMENT=beside: give separate or colocate"),
        (RECIPES[0], dict(PLACEMENT="colocate", TEACHER_NODES="1"), "TEACHER_NODES=1 is for PLACEMENT=separate"),
        (RECIPES[1], dict(VLLM_MEMORY="90"), "VLLM_MEMORY=90: give a share"),
        (RECIPES[1], dict(NNODES="two"), "NNODES=two"),
        ("presample_teacher.sh", dict(RESULT=""), "RESULT is not set"),
        ("presample_teacher.sh", dict(TP="0"), "TP=0"),
        ("presample_teacher.sh", dict(DTYPE="int8"), "DTYPE=int8: give fp32, bf16 or fp16"),
    ],
)
def test_recipes_refuse(given: dict[str, str], script: str, env: dict[str, str], message: str):
    result = launch(script, "--dry-run", **given | env)
    assert result.returncode == 2
    assert message in result.stderr


def fits(command: list[str]) -> str:
    """What `check train` says of the command that a dry run prints."""
    options = dict(pairwise(command))
    per_node = int(options["--nproc-per-node"])
    world = int(options.get("--nnodes", "1")) * per_node
    flags = ["--world_size", str(world), "--ranks_per_node", str(per_node)]
    argv = [*flags, *command[command.index("train") + 1 :]]
    asked, config = parse_beside_train(argv, CheckTrainConfig, command="check train")
    run_preflight(asked, config)
    return str(config.training.global_batch_size)


@pytest.mark.parametrize("placement", ["separate", "colocate"])
def test_the_large_recipe_is_valid_for_every_number_of_nodes(given: dict[str, str], placement: str):
    for nnodes in (*range(1 + (placement == "separate"), 8), 24, 65, 300):
        env = given | C10D | dict(NNODES=str(nnodes), PLACEMENT=placement)
        batch = fits(words(launch(RECIPES[0], "--dry-run", **env)))
        if nnodes == 4:
            assert batch == {"separate": "132", "colocate": "128"}[placement]


@pytest.mark.skipif(find_spec("vllm") is None, reason="sampling needs vllm")
def test_the_on_policy_recipe_is_valid_for_every_number_of_ranks(given: dict[str, str]):
    for nproc, flags in ((1, []), (5, []), (7, []), (100, []), (6, ["--tensor-model-parallel-size=2"])):
        fits(words(launch(RECIPES[1], "--dry-run", *flags, **given, NPROC_PER_NODE=str(nproc))))
    two = ["--pipeline_model_parallel_size", "2", "--tensor_model_parallel_size", "2"]
    env = given | C10D | dict(NNODES="3", NPROC_PER_NODE="4")
    assert fits(words(launch(RECIPES[1], "--dry-run", *two, **env))) == "63"


@pytest.mark.parametrize("start", [["--dry-run"], []], ids=["dry run", "start"])
def test_what_the_run_would_be_refused_for_is_said_before_it_starts(given: dict[str, str], start: list[str]):
    """By the program itself, in one line that is the last one, whether it is a dry run or a start."""
    flags = ["--model", given["STUDENT"], "--teacher_model", given["TEACHER"], "--lmbda", "0"]
    began = time.monotonic()
    for wrong, message in (
        (["--dataset", "/no.jsonl"], "--dataset /no.jsonl: there is no such file or directory"),
        (["--dataset", given["DATASET"], "--global_batch_size", "7"], "the nearest are 6 and 9"),
    ):
        result = launch(SINGLE, *start, *flags, *wrong, **REAL, NPROC_PER_NODE="3")
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert time.monotonic() - began < LIMIT_S / 2, "no rank was started"


def test_the_models_are_held_against_the_layout(given: dict[str, str]):
    flags = ["--model", given["STUDENT"], "--teacher_model", given["TEACHER"], "--dataset", given["DATASET"]]
    flags += ["--lmbda", "0", "--tensor_model_parallel_size", "8", "--world_size", "8"]
    with pytest.raises(LayoutError, match="--model: tensor-parallel size 8 does not divide the 28 attention heads"):
        run_preflight(*parse_beside_train(flags, CheckTrainConfig, command="check train"))


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def test_slurm_command():
    job = dict(SLURM_JOB_ID="31234", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2", MASTER_ADDR="left over")
    result = launch(SLURM, "--dry-run", "--config", "run.yaml", **job)
    command, on_a_node = (shlex.split(line)[1:] for line in result.stdout.splitlines())
    assert command[:3] == ["NNODES=2", "RDZV_ENDPOINT=FIRST_NODE:21234", "RDZV_ID=31234-0"]
    assert has(command, "--ntasks-per-node", "1")
    assert command[-4:] == ["bash", str(ROOT / "launch" / MULTI), "--config", "run.yaml"]
    assert has(on_a_node, "--nnodes", "2", "--nproc-per-node", "8")


def test_slurm_refuses():
    outside = launch(SLURM, "--config", "run.yaml")
    assert outside.returncode == 2
    assert "not in a Slurm job; start it with sbatch" in outside.stderr
    missing = launch(SLURM, "--dry-run", SCRIPT="launch/none.sh")
    assert missing.returncode == 2
    assert "launch/none.sh; call sbatch in the root of the checkout" in missing.stderr


def slurm_stand_ins(root: Path, srun: str) -> dict[str, str]:
    """`scontrol` and `srun` that write what they were asked for; the environment of a job that finds them."""
    commands = {"scontrol": 'echo "$@" >>"$LOG"; [[ $1 != show ]] || { echo n1; sleep 0.3; echo n2; }', "srun": srun}
    for name, body in commands.items():
        (root / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (root / name).chmod(0o755)
    job = dict(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2", GKD_ROOT=str(ROOT))
    return {**os.environ, **CLEAN, **job, "LOG": str(root / "log"), "PATH": f"{root}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_passes_the_exit_code_on_and_does_not_requeue_a_failure(tmp_path: Path, status: int):
    env = slurm_stand_ins(tmp_path, f'echo "$RDZV_ENDPOINT $NNODES $*" >>"$LOG"; exit {status}')
    result = subprocess.run(["bash", str(ROOT / "launch" / SLURM), "--lr", "1"], env=env, timeout=LIMIT_S, check=False)
    assert result.returncode == status
    log = (tmp_path / "log").read_text()
    assert "n1:20007 2 --nodes 2" in log
    assert log.rstrip().endswith("--lr 1")
    assert "requeue" not in log


def test_slurm_requeues_before_its_time_is_up_when_the_step_has_ended(tmp_path: Path):
    srun = 'trap "echo stopped >>$LOG; exit 5" TERM; touch "$LOG.started"; while true; do sleep 0.05; done'
    env = slurm_stand_ins(tmp_path, srun)
    job = subprocess.Popen(["bash", str(ROOT / "launch" / SLURM), "--lr", "1"], env=env, stderr=subprocess.PIPE)
    try:
        wait_for(tmp_path / "log.started")
    finally:
        job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=LIMIT_S)
    assert job.returncode != 0
    assert b"back into the queue" in errors
    assert (tmp_path / "log").read_text().splitlines()[-2:] == ["stopped", "requeue 7"]


def wait_for(path: Path, text: str = "") -> None:
    end = time.monotonic() + LIMIT_S
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} never said {text!r}"
        time.sleep(0.02)
