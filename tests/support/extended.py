"""What the changes of docs/extending.md are held to: a program that runs in a copy of the package to which they were
applied.

    python -m tests.support.extended FOLDER

prints a JSON object, extension -> "" or a traceback. Each check is made once as things are, and once with a planted
fault, which it has to find. One process for all of them: an interpreter with everything imported is what costs.
"""

# mypy: ignore-errors
# The names that the changes add are not in the package that a type checker sees.

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import megatron_gkd
from megatron_gkd import cli
from megatron_gkd.commands import layouts as layouts_command
from megatron_gkd.config import validate
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import SamplingConfig
from megatron_gkd.errors import CheckpointError, ConfigError, RolloutError
from megatron_gkd.fused_linear_jsd import HiddenTeacher, fused_linear_distill
from megatron_gkd.loss import kernels, reference
from megatron_gkd.loss.divergence import Divergence, Form
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.engines import open_engines
from megatron_gkd.topk_jsd import topk_divergence
from megatron_gkd.train.objective import DistillationLoss
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_divergence
from tests.support import bridging
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.numerics import allowed_error, reference_and_truth, transformers_model
from tests.support.ranks_at_work import largest_difference, load_model, megatron, token_ids

TRAIN = ["--model", "S", "--teacher_model", "T", "--dataset", "d.jsonl"]


def check_and_plant(check: Callable[[], None], fault: contextlib.AbstractContextManager[object]) -> None:
    """`check` passes without the fault, and fails with it."""
    check()
    with fault, pytest.raises((AssertionError, RolloutError)):
        check()


# ---- a divergence ----------------------------------------------------------------------------------------------------

BETA, TEMPERATURE, VOCAB, COLUMNS = 0.3, 1.7, 37, 41


def dense_skewed_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """By its definition, for autograd."""
    q_TV, p_TV = (torch.softmax(logits / TEMPERATURE, dim=-1) for logits in (student_TV, teacher_TV))
    return (p_TV * (p_TV / (BETA * p_TV + (1 - BETA) * q_TV)).log()).sum(-1)


def check_values_and_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (4 * torch.randn(9, COLUMNS, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher[0] = student[0]
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    divergence = Divergence(BETA, TEMPERATURE, skewed_kl=True)
    sharded = dict(tp_group=bridging.world(), vocab_size=VOCAB)

    def weighted(loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = student.clone().requires_grad_()
        total = (loss(leaf) * weights).sum()
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    def agree(found: object, expected: object) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def fused(leaf: torch.Tensor) -> torch.Tensor:
        head = torch.eye(COLUMNS, dtype=torch.float64)  # the hidden states are the logits
        taught = HiddenTeacher(teacher, head)
        losses = fused_linear_distill(leaf, head, taught, divergence, token_weights=weights, **sharded)
        agree(losses.per_token, dense_skewed_kl(student[:, :VOCAB], teacher[:, :VOCAB]))
        return losses.loss_sum / weights.sum()

    truth = weighted(lambda leaf: dense_skewed_kl(leaf[:, :VOCAB], teacher[:, :VOCAB]))
    options = dict(beta=BETA, temperature=TEMPERATURE, vocab_size=VOCAB)
    agree(reference.skewed_kl(student, teacher, **options) @ weights, truth[0])
    agree(reference.skewed_kl_grad(student, teacher, **options) * weights[:, None], truth[1])
    agree(weighted(lambda leaf: vocab_parallel_divergence(leaf, teacher, divergence, **sharded)), truth)
    agree(weighted(fused), truth)
    support = reference.topk_support(teacher, 5, vocab_size=VOCAB)
    logprobs = torch.log_softmax(teacher[:, :VOCAB], dim=-1).gather(1, support)
    agree(
        weighted(lambda leaf: topk_divergence(leaf, logprobs, support, divergence, **sharded)),
        weighted(lambda leaf: dense_skewed_kl(leaf.gather(1, support), teacher.gather(1, support))),
    )


def check_divergence(folder: Path) -> None:
    right = Divergence.gradient_factor.fget
    wrong = property(lambda divergence: right(divergence) * (1 + 1e-6))
    check_and_plant(check_values_and_gradients, mock.patch.object(Divergence, "gradient_factor", wrong))
    for beta in (0.0, 1.0):
        with pytest.raises(ConfigError, match="needed for the skewed KL"):
            Divergence(beta, skewed_kl=True)
        with pytest.raises(ConfigError, match="--skewed_kl needs"):
            parse_run_config([*TRAIN, "--skewed_kl", "--beta", str(beta)])
    for flag, form in ({}, Form.GENERAL), ({"--skewed_kl": "true"}, Form.SKEWED_KL):
        asked = parse_run_config([*TRAIN, "--beta", "0.3", *(f"{name}={value}" for name, value in flag.items())])
        loss = DistillationLoss(asked.distillation, tp_group=bridging.world(), vocab_size=VOCAB, teacher_head=None)
        assert loss.divergence.form is form
    assert Form.SKEWED_KL not in kernels.FORMS, "the kernels do not have it"


# ---- a model family --------------------------------------------------------------------------------------------------


def check_family(folder: Path) -> None:
    path = write_tiny_checkpoint(folder / "seed_oss", "seed_oss", layers=2)
    single, truth = reference_and_truth(path, token_ids(300))
    allowed = allowed_error(single, truth)
    config = json.loads((path / "config.json").read_text())

    def check_logits() -> None:
        with megatron():
            difference = largest_difference(load_model(path, Layout()), truth)
        assert difference is not None
        assert difference <= allowed, f"{difference:.3e} from the truth, {allowed:.3e} are allowed"

    @contextlib.contextmanager
    def changed(option: str, value: object) -> Iterator[None]:
        (path / "config.json").write_text(json.dumps(config | {option: value}))
        yield
        (path / "config.json").write_text(json.dumps(config))

    check_and_plant(check_logits, changed("rms_norm_eps", 2 * config["rms_norm_eps"]))
    for option, value in (
        ("attention_bias", False),
        ("attention_out_bias", True),
        ("residual_dropout", 0.1),
        ("attention_dropout", 0.1),
        ("a_new_option", 1),
    ):
        with changed(option, value), pytest.raises(CheckpointError, match=option):
            check_logits()


# ---- a sampling engine -----------------------------------------------------------------------------------------------


def check_engine(folder: Path) -> None:
    path = write_tiny_checkpoint(folder / "engine", "qwen3", tied=True, layers=2)
    draws = torch.get_rng_state()
    local = open_engines(
        SamplingConfig(vllm_mode="transformers"),
        model_path=str(path),
        dtype="fp32",
        max_model_len=bridging.MAX_MODEL_LEN,
        group=bridging.world(),
    )
    assert torch.equal(torch.get_rng_state(), draws)
    (engine,) = local.engines.values()
    with pytest.raises(RolloutError, match="a complete update comes first"):
        engine.generate(bridging.requests(), bridging.GREEDY)
    with megatron():
        student = load_model(path, Layout())
        bridge = bridging.bridge_for(student, local, buckets=bridging.buckets_of(student, to="writer"))
        assert bridge.push(3).num_buckets > 2
        greedy, sampled = (bridge.sample(bridging.requests(), how) for how in (bridging.GREEDY, bridging.SAMPLED))

        @contextlib.contextmanager
        def another_weight() -> Iterator[None]:
            with torch.no_grad():
                engine._parameters["model.norm.weight"][0] += 1
            yield

        check_and_plant(bridge.verify, another_weight())
        bridge.push(4)
    model = transformers_model(path)
    for request in bridging.requests():
        prompt, limit = torch.tensor([request.prompt_ids]), request.max_tokens
        ids = model.generate(prompt, do_sample=False, max_new_tokens=limit, eos_token_id=bridging.STOP)
        assert greedy[request.key].token_ids == tuple(ids[0, len(request.prompt_ids) :].tolist())
        assert greedy[request.key].version == 3
    (alone,) = engine.generate(bridging.requests()[2:3], bridging.SAMPLED)
    assert alone.token_ids == sampled[alone.key].token_ids, "a completion depends on its own request alone"
    assert any(sampled[key].token_ids != greedy[key].token_ids for key in greedy)
    check_modes()


def check_modes() -> None:
    asked = [*TRAIN, "--lmbda", "0.5", "--vllm_mode"]
    with mock.patch.object(validate, "find_spec", return_value=None):
        parse_run_config([*asked, "transformers"]).validate("train")
        with pytest.raises(ConfigError, match="not installed"):
            parse_run_config([*asked, "colocate"]).validate("train")
    with pytest.raises(ConfigError, match="--vllm_tensor_parallel_size is for vLLM"):
        parse_run_config([*asked, "transformers", "--vllm_tensor_parallel_size", "2"]).validate("train")


# ---- a command -------------------------------------------------------------------------------------------------------


def output_of(*argv: str) -> tuple[int | str | None, str, str]:
    """(exit code, stdout, stderr)."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = cli.main(argv)
        except SystemExit as exit_:
            code = exit_.code
    return code, out.getvalue(), err.getvalue()


def check_command(folder: Path) -> None:
    path = write_tiny_checkpoint(folder / "command", "llama", layers=4, heads=8, kv_heads=2)

    def check_lines() -> None:
        code, out, _ = output_of("layouts", "--model", str(path), "--world_size", "12")
        found = [tuple(int(word) for word in line.split() if word.isdigit()) for line in out.splitlines()]
        assert found == [(1, 1, 12), (1, 2, 6), (1, 4, 3), (2, 1, 6), (2, 2, 3), (4, 1, 3)]
        assert code == 0

    check_and_plant(check_lines, mock.patch.object(layouts_command, "check_layout"))
    code, out, _ = output_of("layouts", "--help")
    assert (code, "--world_size" in out, "--model" in out) == (0, True, True)
    assert "layouts" in output_of("--help")[1]
    for wrong, problem in (
        (["--model", str(path)], "--world_size is missing"),
        (["--model", str(path), "--world_size", "0"], "--world_size is 0"),
        (["--model", str(folder / "nowhere"), "--world_size", "2"], "there is no such directory"),
    ):
        code, out, err = output_of("layouts", *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert problem in err, err


CHECKS = {
    "A divergence": check_divergence,
    "A model family": check_family,
    "A sampling engine": check_engine,
    "A command": check_command,
}


def main(folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {"package": str(megatron_gkd.__file__)}
    for name, check in CHECKS.items():
        try:
            check(folder)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
