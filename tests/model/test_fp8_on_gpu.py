"""Steps in fp8 on a real GPU with Transformer Engine: near those in bf16, not equal to them, and exported in bf16; with
delayed scaling and with weights in fp8, what the stand-ins of tests/train/test_delayed_scaling.py and
test_weights_in_fp8.py say of Transformer Engine.

Does not cover: several GPUs; whether a model learns as much in fp8.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.data.collate import collate
from megatron_gkd.model.delayed_scaling import histories, restore_histories
from megatron_gkd.model.quantised import is_quantised, real_value
from megatron_gkd.teacher_pipeline import forward_signals
from megatron_gkd.train.checkpoint.sharded import sharded_state
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.ranks import run_ranks
from tests.support.runs import metrics, train
from tests.support.trainers import Trainer, make_samples, run_config, write_pair, write_rows

LACKS = "a CUDA device" if not torch.cuda.is_available() else "Transformer Engine"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("transformer_engine") is None, reason=f"needs {LACKS}"
    ),
]

SAMPLES = make_samples([(25, 7), (3, 11), (39, 12), (8, 24), (1, 4), (16, 9), (2, 1), (14, 4)])


def _steps(config: Any, packing: bool) -> tuple[list[tuple[float, float]], set[torch.dtype]]:
    """(loss, norm) of three steps on the same samples, and the types of the exported weights."""
    trainer = Trainer(config)
    more: dict[str, Any] = dict(packing=True, max_tokens=128) if packing else {}
    found = [trainer.step(SAMPLES, config.distillation, micro_batch_size=2, **more) for _ in range(3)]
    return [(step.loss, step.grad_norm) for step in found], {w.dtype for w in (found[-1].weights or {}).values()}


@pytest.mark.parametrize("packing", [False, True])
def test_steps_are_near_those_in_bf16(tmp_path: Path, packing: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    models = *write_pair(tmp_path, "llama"), write_rows(tmp_path / "rows.jsonl", 8)
    common: dict[str, Any] = dict(
        device="cuda", dtype="bf16", global_batch_size=8, train_iters=9, lr=1e-3, lr_decay_style="constant"
    )
    ((plain, _),) = run_ranks(_steps, run_config(*models, **common), packing, world=1, fresh=True)
    ((found, dtypes),) = run_ranks(
        _steps, run_config(*models, fp8_format="hybrid", **common), packing, world=1, fresh=True
    )
    assert found != plain, "the products were in fp8"
    for one, other in zip(found, plain, strict=True):
        assert one == pytest.approx(other, rel=0.1)
    assert dtypes == {torch.bfloat16}


DELAYED: dict[str, Any] = dict(fp8_format="hybrid", fp8_recipe="delayed", fp8_amax_history_len=16)
WEIGHTS: dict[str, Any] = dict(fp8_format="hybrid", fp8_param_gather=True, use_distributed_optimizer=True)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _histories(config: Any) -> dict[str, Any]:
    trainer = Trainer(config)
    student = trainer.run.student
    trainer.step(SAMPLES, config.distillation, micro_batch_size=2, with_weights=False)
    seen = histories(student.models)
    with torch.no_grad():
        batch = collate(SAMPLES[:1], pad_to_multiple_of=student.layout.row_multiple)
        forward_signals(
            student.models, student.layout, student.groups, [batch], {}.__setitem__, device=torch.device("cuda"),
            topk=None, vocab_size=trainer.run.loss.vocab_size,
        )  # fmt: skip
    found: dict[str, Any] = {"layers": len(seen), "untouched": _same(histories(student.models), seen)}
    found["moved on"] = any(tensor.count_nonzero() for name, tensor in seen.items() if "amax" in name)
    other = Trainer(config).run.student.models
    found["anew"] = restore_histories(other, seen)
    found["restored"] = _same(histories(other), seen)
    return found


def test_histories_are_kept_and_restored(tmp_path: Path) -> None:
    models = *write_pair(tmp_path, "llama"), write_rows(tmp_path / "rows.jsonl", 8)
    config = run_config(*models, device="cuda", dtype="bf16", global_batch_size=8, train_iters=9, lr=1e-3, **DELAYED)
    ((found),) = run_ranks(_histories, config, world=1, fresh=True)
    assert found["layers"] == 4 * 4 * 4
    assert found["anew"] == []
    assert [found[name] for name in ("untouched", "moved on", "restored")] == [True] * 3


def _weights(config: Any) -> dict[str, bool]:
    trainer = Trainer(config)
    student = trainer.run.student
    weight = student.models[0].decoder.layers[1].self_attention.linear_proj.weight
    name = "model.layers.1.self_attn.o_proj.weight"
    found = {"quantised": is_quantised(weight)}
    rounded = real_value(weight).float()
    found["finer main weights"] = not torch.equal(weight.main_param.view(weight.shape), rounded)
    found["near"] = torch.allclose(weight.main_param.view(weight.shape), rounded, rtol=2**-3, atol=1e-3)
    trainer.step(SAMPLES, config.distillation, micro_batch_size=2, with_weights=False)
    exported = trainer.weights()
    assert exported is not None
    found["export"] = torch.equal(exported[name].cuda(), real_value(weight))
    entry = sharded_state(student, is_loading=False)["model0"]["decoder.layers.1.self_attention.linear_proj.weight"]
    found["checkpoint"] = not is_quantised(entry.data) and torch.equal(entry.data.cuda(), real_value(weight))
    student.leave_device()
    again = trainer.weights()
    assert again is not None
    found["came back"] = _same(again, exported)
    return found


def test_weights_in_fp8_are_read_as_they_are_used(tmp_path: Path) -> None:
    models = *write_pair(tmp_path, "llama"), write_rows(tmp_path / "rows.jsonl", 8)
    common: dict[str, Any] = dict(device="cuda", dtype="bf16", global_batch_size=8, train_iters=9, lr=1e-3)
    ((found),) = run_ranks(_weights, run_config(*models, offload_model=True, **common, **WEIGHTS), world=1, fresh=True)
    assert all(found.values()), found


@pytest.mark.parametrize("given", [DELAYED, WEIGHTS], ids=["delayed", "weights"])
def test_a_resumed_run_goes_on(tmp_path: Path, given: dict[str, Any]) -> None:
    flags = FLAGS | write_inputs(tmp_path / "inputs") | given | dict(dtype="bf16", device="cuda", train_iters=3)
    whole = train(**flags, save=tmp_path / "whole")
    resumed = train(**flags, save=tmp_path / "resumed", load=checkpoint_of(whole))
    for one, other in zip(metrics(resumed, first_step=3), metrics(whole, first_step=3), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
