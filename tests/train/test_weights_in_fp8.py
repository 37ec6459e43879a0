"""`--fp8_param_gather`, on tensors that stand in for Transformer Engine's (tests/support/fp8_weights.py): main weights
begin with what was read, not with what it was rounded to; exports, checkpoints and checksums hold what the forward pass
uses; a run goes on bit for bit; offload frees the memory.

Not covered: Transformer Engine itself (tests/model/test_fp8_on_gpu.py); blockwise scales.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.quantised import is_quantised, real_value
from megatron_gkd.train.checkpoint import sharded
from megatron_gkd.train.preflight import check_paths
from megatron_gkd.train.replicas import weight_sums
from megatron_gkd.weights import load
from megatron_gkd.weights.checksum import checksum
from megatron_gkd.weights.chunks import ExpertRank, check_chunks
from megatron_gkd.weights.hf_files import HFCheckpoint
from tests.support.checkpoint_runs import FLAGS, assert_same_bits, checkpoint_of, write_inputs
from tests.support.fp8_weights import fp8_weights
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, train_on_this_rank
from tests.support.trainers import Trainer, make_samples, run_config, write_pair, write_rows

FP8: dict[str, Any] = dict(fp8_format="hybrid", fp8_param_gather=True, dtype="bf16", use_distributed_optimizer=True)
SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (8, 4)])

# ---- a run that goes on ---------------------------------------------------------------------------------------------


def _train(argv: list[str]) -> None:
    with fp8_weights():
        train_on_this_rank(argv)


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs") | FP8 | dict(train_iters=3, eval_steps=1, check_replicas_steps=1)

    def train(name: str, **flags: Any) -> Path:
        run_ranks(_train, command_line(**FLAGS | inputs | flags, save=tmp_path / name), world=2)
        return tmp_path / name

    whole = train("whole")
    resumed = train("resumed", load=checkpoint_of(whole))
    assert_same_bits(resumed, whole, 3)


# ---- what is read and written ---------------------------------------------------------------------------------------


def _main_weights_are_exact(trainer: Trainer) -> bool:
    run, equal = trainer.run, []
    with HFCheckpoint(trainer.config.model.model) as checkpoint:
        for parameter in check_chunks(run.student.models, run.architecture, ExpertRank.of(run.student.groups)):
            if is_quantised(weight := parameter.tensor):
                read = torch.empty(weight.shape, dtype=weight.dtype)
                load.fill(read, load.parameter_plan(parameter, run.architecture, 0, 1, ExpertRank()), checkpoint)
                equal.append(torch.equal(weight.main_param.view(weight.shape), read.float()))
    return len(equal) == 16 and all(equal)


def _on_a_rank(config: RunConfig) -> dict[str, Any]:
    with fp8_weights():
        trainer = Trainer(config)
        student = trainer.run.student
        found: dict[str, Any] = {"exact": _main_weights_are_exact(trainer)}
        trainer.step(SAMPLES, config.distillation, micro_batch_size=2, with_weights=False)
        exported, model = trainer.weights(), student.models[0]
        assert exported is not None
        found["near"] = all(
            torch.allclose(p.main_param.view(p.shape), real_value(p).float(), rtol=2**-3, atol=1e-2)
            for p in model.parameters()
        )
        weight = model.decoder.layers[1].self_attention.linear_proj.weight
        found["export"] = torch.equal(exported["model.layers.1.self_attn.o_proj.weight"], real_value(weight))
        found["is rounded"] = not torch.equal(real_value(weight), weight.main_param.view(weight.shape).bfloat16())
        found["sum"] = weight_sums(student)["decoder.layers.1.self_attention.linear_proj.weight"] == checksum(
            real_value(weight)
        )
        state = sharded.sharded_state(student, is_loading=False)
        kept = state["model0"]["decoder.layers.1.self_attention.linear_proj.weight"].data
        found["checkpoint"] = type(kept) is torch.Tensor and torch.equal(kept, real_value(weight))
        weight.bytes_.zero_()
        sharded._round_main_weights(student)
        found["as after an update"] = torch.equal(kept, real_value(weight))
        student.leave_device()
        found["freed"] = weight.bytes_.untyped_storage().nbytes() == 0
        again = trainer.weights()
        assert again is not None
        found["came back"] = all(torch.equal(again[name], exported[name]) for name in exported)
        with patch.object(load, "writable", real_value), patch.object(load, "take", type(weight).copy_):
            found["fault found"] = not _main_weights_are_exact(Trainer(config))
    return found


@pytest.fixture(scope="module")
def on_a_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("weights")
    models = *write_pair(root, "llama"), write_rows(root / "rows.jsonl", 8)
    flags: dict[str, Any] = dict(global_batch_size=4, train_iters=9, lr=0.01, offload_model=True) | FP8
    ((found),) = run_ranks(_on_a_rank, run_config(*models, **flags), world=1)
    return found


def test_main_weights_begin_with_what_was_read(on_a_rank: dict[str, Any]) -> None:
    assert on_a_rank["exact"]
    assert on_a_rank["near"], "after an update, too"
    assert on_a_rank["fault found"]


def test_what_reads_a_weight_reads_what_the_forward_pass_uses(on_a_rank: dict[str, Any]) -> None:
    assert on_a_rank["is rounded"]
    assert [on_a_rank[reader] for reader in ("export", "sum", "checkpoint")] == [True] * 3


def test_a_load_rounds_main_weights_as_an_update_does(on_a_rank: dict[str, Any]) -> None:
    assert on_a_rank["as after an update"]


def test_offload_frees_the_memory_that_weights_are_gathered_in(on_a_rank: dict[str, Any]) -> None:
    assert on_a_rank["freed"]
    assert on_a_rank["came back"]


def test_weights_to_begin_with_are_given_as_the_model(tmp_path: Path) -> None:
    models = *write_pair(tmp_path, "llama"), write_rows(tmp_path / "rows.jsonl", 8)
    config = run_config(*models, **FP8, load=models[0], save=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="main weights would begin with what these weights are rounded to"):
        check_paths(config, "train")
