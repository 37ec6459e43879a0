"""`megatron-gkd check teacher` against a server without vLLM: numbers, tolerances, exit codes. vLLM:
tests/teacher_server/test_vllm.py. Not covered: bf16, CUDA.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch

from megatron_gkd import cli
from megatron_gkd.commands.check_teacher import compare_row
from megatron_gkd.teacher.signals import TopKSignal
from tests.support.fake_teacher_server import FakeServer, random_teacher, serve
from tests.support.numerics import EPS, FLOOR
from tests.support.ranks import one_rank_group, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line
from tests.teacher.test_served import TOPK, Served


def check(argv: list[str]) -> tuple[int, str, str]:
    """On a rank of a pool: the command makes process groups."""
    out, err = io.StringIO(), io.StringIO()
    with megatron(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    return code, out.getvalue(), err.getvalue()


ROUNDING = FLOOR * EPS * 10  # of log-probabilities in float32, which are down to -10 here


def compare_shifted(by: float) -> tuple[float, float, float, float]:
    """The comparison of a random teacher with its own top K, the first log-probability changed."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    values, ids = logits.log_softmax(-1).topk(4)
    values = values.clone()
    values[0, 0] -= by
    found = compare_row(logits, TopKSignal(values, ids), beta=0.5, tp_group=one_rank_group())
    losses = (found.loss_server - found.loss_local).abs()
    return found.logprob.max().item(), losses[0].item(), losses[1:].max().item(), found.other.double().mean().item()


def test_what_is_compared() -> None:
    ((logprob, loss, rest, other),) = run_ranks(compare_shifted, 0.0, world=1)
    assert max(logprob, loss, rest, other) <= ROUNDING
    ((logprob, loss, rest, other),) = run_ranks(compare_shifted, 0.3, world=1)
    assert logprob == pytest.approx(0.3, abs=ROUNDING)
    assert loss > 1e-3, "of first order in the error"
    assert max(rest, other) <= ROUNDING


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    served = Served(tmp_path, "qwen3_moe")
    flags = dict(teacher_model=served.teacher, gkd_logits_topk=TOPK, dataset=served.rows, dtype="fp32", device="cpu")
    with serve(served.fake) as url:
        argv = ["check", "teacher", *command_line(**flags, teacher_model_server=url)]
        ((code, out, err),) = run_ranks(check, argv, world=1)
    assert code == 0, err
    assert float(out.splitlines()[2].split()[-1]) < 1e-4


def test_the_command(tmp_path: Path) -> None:
    served = Served(tmp_path)
    flags = dict(teacher_model=served.teacher, gkd_logits_topk=TOPK, dataset=served.rows, dtype="fp32", device="cpu")
    with serve(served.fake) as right, serve(FakeServer(random_teacher(), max_model_len=256)) as wrong:
        argv = ["check", "teacher", *command_line(**flags, teacher_model_server=right)]
        ((code, out, err),) = run_ranks(check, argv, world=1)
        assert code == 0, err
        assert out.splitlines()[0].split() == ["rows", "12"]
        assert float(out.splitlines()[2].split()[-1]) < 1e-4
        argv = ["check", "teacher", *command_line(**flags, teacher_model_server=wrong, num_rows=2)]
        ((code, out, err),) = run_ranks(check, argv, world=1)
        assert code == cli.EXIT_CHECK_FAILED == 1
        assert "completion tokens" in out
        assert "is not the teacher of" in err
        assert "the largest difference of the log-probabilities is" in err
        argv = ["check", "teacher", *command_line(**(flags | {"gkd_logits_topk": 17}), teacher_model_server=right)]
        ((code, _, err),) = run_ranks(check, argv, world=1)
        assert code == cli.EXIT_USAGE == 2
        assert "refuses to return 17 tokens" in err
