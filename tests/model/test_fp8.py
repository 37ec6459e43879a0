"""`--fp8_format`: what megatron-core is told, to what lengths rows are padded, and what is refused.

What Transformer Engine makes of it is in test_fp8_on_gpu.py. Here there is none: `find_spec` answers for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.model import levers
from megatron_gkd.model.build import transformer_config
from megatron_gkd.model.levers import check_student, optimizer_options, student_options, teacher_options
from megatron_gkd.model.sequences import Sequences
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.schedule import plan_micro_batches
from megatron_gkd.train.fit import check_batch, layouts
from tests.support.models import small
from tests.support.trainers import make_samples

WEIGHTS: dict[str, Any] = dict(fp8_param_gather=True, use_distributed_optimizer=True)
ARCH = replace(small("qwen3"), hidden_size=128, ffn_hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=32)


@pytest.fixture(autouse=True)
def _transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "find_spec", lambda name: object() if name == "transformer_engine" else None)


def config_of(**flags: Any) -> RunConfig:
    given = dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0, dtype="bf16", fp8_format="hybrid")
    given["apply_rope_fusion"] = False  # for which megatron-core looks itself
    config = RunConfig.from_flat(given | flags)
    config.validate("train")
    return config


def test_megatron_core_is_told() -> None:
    for flags, recipe in ((dict(), "tensorwise"), (dict(fp8_recipe="blockwise"), "blockwise")):
        options = student_options(config_of(**flags), "cuda")
        told = transformer_config(ARCH, Layout(), options, dtype="bf16")
        assert (told.fp8, told.fp8_recipe, told.fp8_param) == ("hybrid", recipe, False)
    teacher = transformer_config(ARCH, Layout(), teacher_options(config_of(), "cuda"), dtype="bf16")
    assert teacher.fp8 is None


def test_megatron_core_is_told_of_delayed_scaling() -> None:
    delayed = config_of(fp8_recipe="delayed", fp8_margin=2, fp8_amax_history_len=16, fp8_amax_compute_algo="max")
    check_student(delayed, ARCH, Layout(), "cuda")
    told = transformer_config(ARCH, Layout(), student_options(delayed, "cuda"), dtype="bf16")
    assert (told.fp8_recipe, told.fp8_margin, told.fp8_amax_history_len) == ("delayed", 2, 16)
    assert told.fp8_amax_compute_algo == "max"


def test_megatron_core_is_told_of_weights_in_fp8() -> None:
    weights = config_of(**WEIGHTS)
    check_student(weights, ARCH, Layout(), "cuda")
    options = student_options(weights, "cuda")
    assert transformer_config(ARCH, Layout(), options, dtype="bf16").fp8_param
    assert options.ddp_fields()["fp8_param_gather"]
    assert optimizer_options(weights) == {"fp8_recipe": "tensorwise"}


def test_layers_that_stay_in_bf16() -> None:
    extra = '{"first_last_layers_bf16": true, "num_layers_at_end_in_bf16": 0}'
    config = config_of(megatron_extra_kwargs=extra)
    check_student(config, ARCH, Layout(), "cuda")
    told = transformer_config(ARCH, Layout(), student_options(config, "cuda"), dtype="bf16")
    assert (told.first_last_layers_bf16, told.num_layers_at_start_in_bf16, told.num_layers_at_end_in_bf16) == (1, 1, 0)


@pytest.mark.parametrize(("recipe", "tokens"), [(None, 16), ("tensorwise", 16), ("mxfp8", 32), ("blockwise", 128)])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(tensor_model_parallel_size=2, sequence_parallel=True),
        dict(context_parallel_size=2),
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ],
)
def test_every_rank_is_fed_whole_blocks_of_tokens(recipe: str | None, tokens: int, sizes: dict[str, Any]) -> None:
    student, teacher = layouts(config_of(fp8_recipe=recipe, **sizes), 4)
    assert teacher.token_multiple == 1
    samples = make_samples([(25, 7), (3, 11), (39, 12), (8, 24)])
    for packing in (False, True):
        plan = plan_micro_batches(
            [sample.num_inputs for sample in samples], data_parallel_size=student.data, micro_batch_size=1,
            packing=packing, max_tokens=1024 if packing else None,
        )  # fmt: skip
        sequences = Sequences(samples, plan, student, packing=packing)
        for batch in (batch for batches in plan for batch in batches):
            shares = student.context * (student.tensor if student.sequence_parallel else 1)
            assert sequences.num_fed(batch) % (shares * tokens) == 0
            assert sequences.num_fed(()) % (shares * tokens) == 0


def test_a_budget_counts_the_padding() -> None:
    config = config_of(max_tokens_per_gpu=64, max_length=64, fp8_recipe="blockwise")
    with pytest.raises(ConfigError, match=r"lengths are multiples of 128 here .* need 128"):
        check_batch(config, layouts(config, 1)[0])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(fp8_format=None, fp8_recipe="tensorwise"), "--fp8_recipe tensorwise needs --fp8_format"),
        (dict(fp8_format=None, fp8_param_gather=True), "--fp8_param_gather needs --fp8_format"),
        (dict(fp8_param_gather=True, use_distributed_optimizer=False), "gathers what --use_distributed_optimizer has"),
        (dict(fp8_margin=1), "--fp8_margin is for --fp8_recipe delayed"),
        (dict(fp8_recipe="blockwise", fp8_amax_history_len=16), "--fp8_amax_history_len is for --fp8_recipe delayed"),
    ],
)
def test_what_contradicts(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(**flags)


@pytest.mark.parametrize(
    ("flags", "layout", "said"),
    [
        (dict(dtype="fp32"), Layout(), "beside --dtype fp32: what is not in fp8 is in bf16"),
        (dict(tuner_type="lora"), Layout(), "a student with adapters has layers that are not Transformer Engine's"),
        (dict(fp8_recipe="blockwise"), Layout(tensor=2), "attention output of a rank is 64, .* a multiple of 128"),
        (
            dict(fp8_recipe="delayed", recompute_granularity="selective", recompute_modules=["layernorm"]),
            *(Layout(), "--fp8_recipe delayed beside --recompute_modules layernorm"),
        ),
        (
            dict(fp8_recipe="delayed", megatron_extra_kwargs='{"first_last_layers_bf16": true}'),
            *(Layout(), "--fp8_recipe delayed beside --megatron_extra_kwargs first_last_layers_bf16"),
        ),
        (dict(WEIGHTS, fp8_recipe="delayed"), Layout(), "rounded with a scale of 1, before there is a history"),
        (dict(WEIGHTS, fp8_recipe="mxfp8"), Layout(), "gathered in the gradients' memory"),
        (
            dict(WEIGHTS, overlap_grad_reduce=True, overlap_param_gather=True),
            *(Layout(), "transposed copies of weights in fp8 would stay"),
        ),
        (
            dict(WEIGHTS, use_precision_aware_optimizer=True, main_params_dtype="fp16"),
            *(Layout(), "--main_params_dtype fp16: that optimizer makes its main weights of the parameters"),
        ),
    ],
)
def test_what_does_not_fit_the_student(flags: dict[str, Any], layout: Layout, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_student(config_of(**flags), ARCH, layout, "cuda")


def test_the_device_must_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--fp8_format hybrid needs CUDA, and this run is on a CPU"):
        student_options(config_of(), "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    student_options(config_of(), "cuda")
    with pytest.raises(ConfigError, match=r"--fp8_recipe mxfp8 needs a GPU of compute capability 10\.0, .* has 9\.0"):
        student_options(config_of(fp8_recipe="mxfp8"), "cuda")
    monkeypatch.setattr(levers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--fp8_format hybrid needs the package transformer_engine"):
        student_options(config_of(), "cuda")
