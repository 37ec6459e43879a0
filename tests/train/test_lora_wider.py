"""Adapters of experts, and modules that are trained whole beside adapters, in runs: files, merged weights, conversion,
the base as teacher; and a first step that is that of full training.

A run is small, of a tiny Qwen3-MoE with a tied head. Gradients: test_lora_exact.py; resume: test_checkpoint.py. Not
covered: vLLM; bf16.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.attention import SDPBackend

from megatron_gkd.commands.convert import parse_convert_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.model import layers, levers
from megatron_gkd.model.layers import SDPAttention
from megatron_gkd.model.lora import base_value
from megatron_gkd.weights import export, whole_modules
from megatron_gkd.weights.whole_modules import check_modules
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_lora import ALL, EMBEDDING, HEAD, PREFIX, RUN, check_merged, write_adapter
from tests.support.dense_step import all_logits
from tests.support.effort import FULL
from tests.support.models import small
from tests.support.numerics import within_reference_error
from tests.support.peft_itself import need_peft, peft_logits
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.runs import (
    adapter_of,
    command_line,
    convert_on_this_rank,
    exported,
    metrics,
    train,
    train_on_this_rank,
)
from tests.support.trainers import make_samples, write_rows

MODULES = ["embed_tokens", "norm", "input_layernorm", "q_norm"]
LORA: dict[str, Any] = dict(tuner_type="lora", lora_rank=4, lora_alpha=8, modules_to_save=MODULES)
STEPS = 2


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("lora_wider")
    sizes: dict[str, Any] = dict(tied=True, layers=2, hidden_size=32, ffn_hidden_size=48, moe_intermediate_size=24)
    student = write_tiny_checkpoint(root / "student", "qwen3_moe", seed=1, **sizes)
    teacher = write_tiny_checkpoint(root / "teacher", "qwen3", seed=2, layers=1, hidden_size=32)
    return dict(
        model=student,
        teacher_model=teacher,
        dataset=write_rows(root / "rows.jsonl", 8),
        eval_dataset=write_rows(root / "held_out.jsonl", 2, seed=9),
        train_iters=STEPS,
        save_steps=STEPS,
        **RUN,
        **LORA,
    )


@pytest.fixture(scope="module")
def whole(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout: dict[str, Any] = dict(expert=2, teacher_expert=1, merge_lora=True)
    return train(world=2, **flags, **layout, save=tmp_path_factory.mktemp("whole") / "run")


def test_merged_weights_are_the_formula_and_the_modules(whole: Path, flags: dict[str, Any]) -> None:
    base, merged, tensors = load_file(flags["model"] / "model.safetensors"), exported(whole), adapter_of(whole)
    assert torch.equal(tensors[PREFIX + HEAD], tensors[PREFIX + EMBEDDING])
    check_merged(base, merged, tensors, scale=8 / 4)
    same = {name for name, weight in base.items() if torch.equal(merged[name], weight)}
    assert {name.rsplit(".", 2)[-2] for name in same} == {"gate", "k_norm", "post_attention_layernorm"}


def test_the_adapter_says_what_it_is(whole: Path) -> None:
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "input_layernorm", "q_norm", "model.norm"]
    assert config["ensure_weight_tying"] is True
    assert set(config["target_modules"]) == set(ALL)
    assert f"{PREFIX}model.layers.1.mlp.experts.3.down_proj.lora_B.weight" in adapter_of(whole)
    record = json.loads((whole / "export.json").read_text())
    assert record["exported"] == record["trained"], "read back and evaluated"


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1: test_export.py has adapters without experts")
def test_peft_loads_it_as_the_merged_student(whole: Path, flags: dict[str, Any]) -> None:
    need_peft()
    paths, samples = (str(flags["model"]), str(whole / "adapter")), make_samples([(4, 9), (2, 5)], vocab_size=300)
    (of_peft,) = run_ranks(peft_logits, *paths, samples, world=1, fresh=True)
    within_reference_error(torch.cat(all_logits(str(whole / "hf"), samples)), *of_peft)


def test_a_checkpoint_holds_what_is_trained(whole: Path) -> None:
    """Each value, and each of its moments, once, and nothing else."""
    stored = FileSystemReader(whole / "checkpoints" / f"step_{STEPS:08d}").read_metadata().state_dict_metadata
    trained = sum(tensor.numel() for name, tensor in adapter_of(whole).items() if name != PREFIX + HEAD)
    trained += 32 * (384 - 300)  # padding of the embedding
    sizes = {name: entry.size.numel() for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    of_optimizer = [name for name in sizes if name.startswith("optimizer.state.")]
    assert sum(sizes[name] for name in sizes.keys() - of_optimizer) == trained
    for kind in ("exp_avg", "exp_avg_sq"):
        assert sum(sizes[name] for name in of_optimizer if name.startswith(f"optimizer.state.{kind}.")) == trained


# ---- conversion of a checkpoint --------------------------------------------------------------------------------------


def test_a_checkpoint_becomes_what_its_run_exports(whole: Path, flags: dict[str, Any], tmp_path: Path) -> None:
    """In another layout than the run's; bit for bit."""
    given = dict(model=whole / "checkpoints" / f"step_{STEPS:08d}", hf_config=flags["model"])
    layout: dict[str, Any] = dict(tensor=2)
    run_ranks(convert_on_this_rank, command_line(to="peft", **given, save=tmp_path / "peft"), world=1)
    run_ranks(convert_on_this_rank, command_line(to="hf", **given, **layout, save=tmp_path / "hf"), world=2)
    ours, theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors"), adapter_of(whole)
    assert {name: x.tolist() for name, x in ours.items()} == {name: x.tolist() for name, x in theirs.items()}
    config, of_run = (
        json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "peft", whole / "adapter")
    )
    assert config == of_run
    ours, theirs = load_file(tmp_path / "hf" / "model.safetensors"), exported(whole)
    assert {name: x.tolist() for name, x in ours.items()} == {name: x.tolist() for name, x in theirs.items()}
    for wrong, said in (
        (dict(to="peft", hf_config=flags["teacher_model"]), "holds adapters of other weights than those of"),
        (dict(to="hf", check=True), "--check compares whole models"),
    ):
        with pytest.raises(RankFailureError, match=said):
            run_ranks(convert_on_this_rank, command_line(**given | wrong, save=tmp_path / "wrong"), world=1)
    given.pop("hf_config")
    with pytest.raises(ConfigError, match="--to peft needs --hf_config"):
        parse_convert_config(command_line(to="peft", **given, save=tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


# ---- the base as teacher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [dict(tensor=2), *([dict(pipeline=2)] if FULL else [])], ids=str)
def test_the_base_teaches_with_the_values_it_had(flags: dict[str, Any], tmp_path: Path, layout: dict[str, int]) -> None:
    """Embedding, head and norms of the student have moved; its teacher is as a copy of the base is."""
    sizes: dict[str, Any] = dict(layers=2, hidden_size=32, ffn_hidden_size=48)
    model = write_tiny_checkpoint(tmp_path / "model", "qwen3", seed=3, **sizes)
    copy = shutil.copytree(model, tmp_path / "copy")
    rows = write_rows(tmp_path / "rows.jsonl", 8, teacher_prompts=True)
    given = flags | layout | dict(model=model, dataset=rows, on_teacher_fault="warn", merge_lora=True, save_steps=100)
    given |= dict(modules_to_save=["embed_tokens", "lm_head", "norm"], use_distributed_optimizer=True)
    second = train(world=2, **given | dict(teacher_model=copy), save=tmp_path / "second")
    base = train(world=2, **given | dict(teacher_model=model), save=tmp_path / "base")
    assert metrics(base) == metrics(second)
    assert metrics(base, file="evaluation.jsonl") == metrics(second, file="evaluation.jsonl") != []
    merged, expected = exported(base), exported(second)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items()), "the values that were trained"


def train_and_send_the_base(argv: list[str]) -> None:
    of_adapter = partial(export.HFTensorStream, read=export._value)  # what is written of the adapter stays right
    with (
        patch.object(export, "_value", lambda parameter: base_value(parameter.tensor)),
        patch.object(whole_modules, "HFTensorStream", of_adapter),
    ):
        train_on_this_rank(argv)


def test_a_module_left_at_its_base_value_in_what_is_sent_is_found(flags: dict[str, Any], tmp_path: Path) -> None:
    given = flags | dict(teacher_model=flags["model"], merge_lora=True, sft_alpha=1.0, save=tmp_path / "run")
    run_ranks(train_and_send_the_base, command_line(**given), world=1)
    merged, trained = exported(tmp_path / "run"), adapter_of(tmp_path / "run")
    assert not torch.equal(merged[EMBEDDING], trained[PREFIX + EMBEDDING])


# ---- full training's first step --------------------------------------------------------------------------------------


def test_a_full_rank_takes_full_trainings_first_step(flags: dict[str, Any], tmp_path: Path) -> None:
    """With r = in, A the identity, B = 0 and s = 1 the gradient of B is that of W, and of A is 0. So AdamW's first step
    of B, without weight decay, is that of W; and with embedding, head and norms trained whole the merged student is
    full training's, its norm and clipping too. All matrices are square."""
    sizes: dict[str, Any] = dict(layers=1, hidden_size=32, ffn_hidden_size=32, heads=2, kv_heads=2, head_dim=16)
    model = write_tiny_checkpoint(tmp_path / "model", "llama", seed=4, **sizes)
    adapter = Path(write_adapter(tmp_path / "adapter", model, rank=32, alpha=32.0))
    tensors = load_file(adapter / "adapter_model.safetensors")
    values = {name: torch.eye(32) if ".lora_A." in name else torch.zeros(32, 32) for name in tensors}
    modules = ["embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"]
    values |= {
        PREFIX + name: tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if PREFIX + name.removesuffix(".weight") + ".lora_A.weight" not in values
    }
    save_file(values, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | dict(modules_to_save=modules)))
    given = {name: value for name, value in flags.items() if name not in LORA}
    given |= dict(model=model, train_iters=1, weight_decay=0.0, clip_grad=0.02, lr_decay_style="constant", tensor=2)
    lora: dict[str, Any] = dict(tuner_type="lora", lora_rank=32, lora_alpha=32, modules_to_save=modules)
    full = train(world=2, **given, save=tmp_path / "full")
    ours = train(world=2, **given, **lora, adapters=adapter, merge_lora=True, save=tmp_path / "lora")
    expected, found, before = exported(full), exported(ours), load_file(model / "model.safetensors")
    (of_full,), (of_lora,) = metrics(full), metrics(ours)
    assert of_full["grad_norm"] > 0.02
    assert of_lora["grad_norm"] == pytest.approx(of_full["grad_norm"], rel=1e-5)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        step = (weight - before[name]).abs().max()
        assert step > 1e-2, name
        assert (found[name] - weight).abs().max() < 1e-4 * step, name


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_module_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"--modules_to_save q_proj: of a qwen3_moe model .*lm_head \(matrices"):
        check_modules(small("qwen3_moe"), ["norm", "q_proj"])
    with pytest.raises(ConfigError, match="--modules_to_save q_norm: of a llama model"):
        check_modules(small("llama"), ["q_norm"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(ensure_weight_tying=False), "trained the embedding apart from the head"),
        (HEAD, "differs from base_model.model.model.embed_tokens.weight"),
        (
            EMBEDDING,
            "has no base_model.model.model.embed_tokens.weight: give the --target_modules and --modules_",
        ),
        ({}, "holds base_model.model.model.layers.0.input_layernorm.weight .and 3 more., which is not asked for"),
    ],
    ids=["apart", "differs", "lacks", "not asked for"],
)
def test_an_adapter_of_another_model(
    whole: Path, flags: dict[str, Any], tmp_path: Path, change: Any, said: str
) -> None:
    adapter = shutil.copytree(whole / "adapter", tmp_path / "adapter")
    file, given = adapter / "adapter_model.safetensors", flags
    tensors = load_file(file)
    if change == {}:
        given = flags | dict(modules_to_save=["embed_tokens", "norm"])
    elif isinstance(change, dict):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    elif change == HEAD:
        tensors[PREFIX + HEAD] = tensors[PREFIX + HEAD] + 1
    else:
        del tensors[PREFIX + change]
    save_file(tensors, file)
    with pytest.raises(RankFailureError, match=said):
        train(**given, adapters=adapter, save=tmp_path / "run")


# ---- attention beside adapters ---------------------------------------------------------------------------------------


def test_attention_beside_adapters_is_torchs_by_name(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Transformer Engine, on a GPU; the kernel is chosen where the attention is computed."""
    given = {name: value for name, value in flags.items() if name not in ("dataset", "eval_dataset", "report_to")}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    given |= dict(dataset=[str(flags["dataset"])], lmbda=0.0, attention_backend="unfused", device="cuda")
    monkeypatch.setattr(levers, "find_spec", lambda name: None)
    config = RunConfig.from_flat(given)
    config.validate("train")
    options = levers.student_options(config, "cuda")
    assert not options.transformer_engine
    layer: Any = SimpleNamespace(attention_dropout=0.0, context_parallel_size=1, window_size=None)
    layer.attention_backend = options.attention_backend
    attention = SDPAttention(layer, 1, AttnMaskType.causal, "self")
    called: list[Any] = []
    monkeypatch.setattr(layers, "sdpa_kernel", lambda kernels: called.append(kernels) or nullcontext())
    qkv = torch.randn(3, 4, 1, 2, 8)
    attention(*qkv, None)
    assert called == [[SDPBackend.MATH]]
    with pytest.raises(ConfigError, match="flash is torch's with adapters, and has no fp32"):
        RunConfig.from_flat(given | dict(attention_backend="flash", dtype="fp32")).validate("train")
