"""Generated combinations of flags, seeded: each flag away from its default changes what the run is told, or is refused
by name, or is named as without effect, and what is named so changes nothing.

The judge is tests/support/resolved.py: the program's own functions, with recorders in place of models and machines. The
same flags without one of them must come to another run, unless that one is named, or says what the default comes to
anyway (`says_the_default`). Not covered: flags that the loop itself reads (`APART`), and the right size of an effect.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_gkd.config import validate as contradictions
from megatron_gkd.config.no_effect import without_effect
from megatron_gkd.config.not_built import Command
from megatron_gkd.config.run import RunConfig, flags
from megatron_gkd.errors import GKDError
from tests.support.effort import count
from tests.support.ranks import run_ranks
from tests.test_architecture import read

pytestmark = pytest.mark.timeout(900)

NUM = count(80, 2000)  # of train; a third as many of eval
SERVERS = '[{"url": "http://a:1", "tags": ["math"]}, {"url": "http://b:2"}]'
VALUES: dict[str, tuple[Any, ...]] = {
    "teacher_model": ("T",),
    "dtype": ("bf16", "fp16"),
    "use_hf": (False,),
    "freeze_embeddings": (True,),
    "freeze_router": (True,),
    "freeze_vision": (False,),
    "freeze_projector": (True,),
    "max_image_tiles": (1, 3),
    "image_url_dir": ("d",),
    "tuner_type": ("lora",),
    "lora_rank": (2,),
    "lora_alpha": (7.0,),
    "use_rslora": (True,),
    "lora_dropout": (0.1,),
    "target_modules": (["q_proj"],),
    "modules_to_save": (["norm"],),
    "adapters": ("A",),
    "merge_lora": (True,),
    "objective": ("sft",),
    "teacher_model_server": ("http://a:1", "http://a:1,http://b:2", SERVERS),
    "teacher_tag_key": ("subject",),
    "teacher_timeout_s": (7.0,),
    "teacher_tensor_model_parallel_size": (1, 2),
    "teacher_pipeline_model_parallel_size": (1, 2),
    "teacher_context_parallel_size": (1, 2),
    "teacher_decoder_first_pipeline_num_layers": (1,),
    "teacher_decoder_last_pipeline_num_layers": (1,),
    "teacher_account_for_embedding_in_pipeline_split": (True,),
    "teacher_account_for_loss_in_pipeline_split": (True,),
    "teacher_pipeline_model_parallel_layout": ("Et|tL",),
    "teacher_expert_model_parallel_size": (2,),
    "teacher_expert_tensor_parallel_size": (2,),
    "teacher_placement": ("separate",),
    "teacher_world_size": (2, 4),
    "teacher_nodes": (1,),
    "offload_teacher_model": (True,),
    "teacher_micro_batch_size": (2, 3),
    "teacher_micro_batch_tokens": (1500,),
    "signal_memory_gb": (2.0,),
    "beta": (0.0, 0.3, 1.0, "0:0.1,40:1"),
    "lmbda": (0.0, 1.0, 0.3, "0:0,40:1"),
    "seq_kd": (True,),
    "sft_alpha": (0.5,),
    "gkd_logits_topk": (1, 4, 9),
    "topk_tail": ("bucket",),
    "loss_temperature": (2.0,),
    "loss_path": ("fused", "logits"),
    "use_liger_kernel": (True,),
    "temperature": (0.5, 2.5, "0:0.5,40:1"),
    "top_p": (0.5,),
    "top_k": (7,),
    "max_completion_length": (9, "0:9,40:99"),
    "use_vllm": (False,),
    "vllm_mode": ("server", "subprocess"),
    "vllm_gpu_memory_utilization": (0.5,),
    "vllm_tensor_parallel_size": (2,),
    "vllm_enforce_eager": (True,),
    "vllm_max_num_seqs": (8,),
    "vllm_enable_lora": (True,),
    "vllm_engine_kwargs": ('{"block_size": 32}',),
    "vllm_max_model_len": (701,),
    "sleep_level": (1, 2),
    "vllm_server_host": ("h", "h:9,g", "h:9,g:10"),
    "vllm_server_port": (9000,),
    "vllm_server_timeout": (61.0,),
    "steps_per_generation": (2,),
    "rollout_lag": (1,),
    "weight_bucket_mb": (64,),
    "verify_sync_every": (5,),
    "teacher_samples_cache": ("cache",),
    "teacher_sampling_steps": (4,),
    "teacher_vllm_tensor_parallel_size": (2,),
    "teacher_vllm_gpu_memory_utilization": (0.5,),
    "tensor_model_parallel_size": (2,),
    "pipeline_model_parallel_size": (2,),
    "context_parallel_size": (2,),
    "expert_model_parallel_size": (2,),
    "expert_tensor_parallel_size": (2,),
    "virtual_pipeline_model_parallel_size": (1, 2),
    "sequence_parallel": (True,),
    "decoder_first_pipeline_num_layers": (1,),
    "decoder_last_pipeline_num_layers": (1,),
    "account_for_embedding_in_pipeline_split": (True,),
    "account_for_loss_in_pipeline_split": (True,),
    "pipeline_model_parallel_layout": ("Et|tL",),
    "use_distributed_optimizer": (False,),
    "device": ("cpu",),
    "distributed_timeout_minutes": (20.0,),
    "check_replicas_steps": (3,),
    "dataset_weights": ([1.0, 3.0],),
    "eval_dataset": (["e.jsonl"],),
    "eval_samples": (5,),
    "max_length": (700,),
    "packing": (True,),
    "on_bad_row": ("skip",),
    "overlong": ("stop", "truncate_left"),
    "loss_scale": ("all",),
    "chat_template_kwargs": ('{"a": 1}', '{"enable_thinking": true}'),
    "enable_thinking": (True, False),
    "external_plugins": (["p.py"],),
    "prompt_template": ("{a}",),
    "teacher_prompt_template": ("{a}",),
    "prompt_only": ("drop",),
    "shuffle": (False,),
    "streaming": (True,),
    "data_cache_dir": ("kept",),
    "micro_batch_size": (2, 4),
    "max_tokens_per_gpu": (1500, 3000),
    "global_batch_size": (32, 64, 20),
    "train_iters": (20,),
    "num_train_epochs": (3.0,),
    "lr": (1e-3,),
    "min_lr": (1e-6,),
    "lr_decay_style": ("constant", "linear"),
    "lr_warmup_fraction": (0.75,),
    "lr_warmup_iters": (7,),
    "weight_decay": (0.0,),
    "moe_aux_loss_coeff": (0.01,),
    "moe_router_load_balancing_type": ("seq_aux_loss", "global_aux_loss"),
    "moe_z_loss_coeff": (0.001,),
    "clip_grad": (0.0,),
    "adam_beta1": (0.5,),
    "adam_beta2": (0.5,),
    "adam_eps": (1e-2,),
    "max_bad_steps": (9,),
    "seed": (1,),
    "recompute_granularity": ("selective", "full"),
    "recompute_method": ("uniform", "block"),
    "recompute_num_layers": (1, 2),
    "recompute_modules": (["core_attn"], ["mlp", "layernorm"]),
    "overlap_grad_reduce": (True,),
    "overlap_param_gather": (True,),
    "align_param_gather": (True,),
    "ddp_bucket_size": (1000,),
    "attention_backend": ("flash",),
    "cp_comm_type": (["all_gather"], ["p2p", "p2p", "a2a"], ["a2a+p2p"]),
    "masked_softmax_fusion": (True,),
    "attention_softmax_in_fp32": (False,),
    "accumulate_allreduce_grads_in_fp32": (False,),
    "apply_rope_fusion": (True, False),
    "gradient_accumulation_fusion": (True, False),
    "bias_dropout_fusion": (True, False),
    "bias_activation_fusion": (True, False),
    "moe_grouped_gemm": (True, False),
    "moe_permute_fusion": (True, False),
    "cross_entropy_loss_fusion": (True, False),
    "tp_comm_overlap": (True,),
    "fp8_format": ("hybrid",),
    "fp8_recipe": ("delayed",),
    "fp8_margin": (1,),
    "fp8_amax_history_len": (16,),
    "fp8_amax_compute_algo": ("max",),
    "fp8_param_gather": (True,),
    "deterministic_mode": (True,),
    "empty_unused_memory_level": (1,),
    "manual_gc": (True,),
    "manual_gc_interval": (7,),
    "megatron_extra_kwargs": ('{"qk_clip": true}', '{"qk_clap": true}'),
    "use_precision_aware_optimizer": (True,),
    "main_grads_dtype": ("bf16",),
    "main_params_dtype": ("fp16",),
    "exp_avg_dtype": ("bf16",),
    "exp_avg_sq_dtype": ("bf16",),
    "optimizer_cpu_offload": (True,),
    "optimizer_offload_fraction": (0.5,),
    "overlap_cpu_optimizer_d2h_h2d": (True,),
    "offload_model": (True,),
    "offload_optimizer": (True,),
    "save": ("other",),
    "load": ("earlier",),
    "auto_resume": (True,),
    "verify_checkpoint": ("sizes",),
    "allow_changed_config": (True,),
    "save_steps": (3,),
    "async_save": (True,),
    "save_total_limit": (2,),
    "no_save_optim": (True,),
    "no_save_rng": (True,),
    "no_load_optim": (True,),
    "no_load_rng": (True,),
    "finetune": (True,),
    "save_hf": (False,),
    "save_hf_dtype": ("bf16", "source"),
    "logging_steps": (5,),
    "eval_steps": (3,),
    "eval_generate": (5,),
    "eval_verifier": ("exact", "mine:right"),
    "loss_spike_factor": (3.0,),
    "health_steps": (0, 7),
    "on_teacher_fault": ("warn",),
    "report_to": (["none"],),
    "log_completions": (True,),
    "num_completions_to_log": (3,),
    "log_level": ("debug",),
}
# What makes others count, drawn often.
SCENES: tuple[dict[str, Any], ...] = (
    *({"lmbda": lmbda, "teacher_model": "T"} for lmbda in (0.0, 0.3, 1.0)),
    {"lmbda": 0.3, "teacher_model": "T", "vllm_mode": "server", "vllm_server_host": "h"},
    {"lmbda": 1.0, "teacher_model": "T", "vllm_mode": "subprocess"},
    {"lmbda": 0.3, "teacher_model": "T", "seq_kd": True},
    {"lmbda": 0.0, "teacher_model": "T", "seq_kd": True, "eval_dataset": ["e.jsonl"]},
    {"lmbda": 0.0, "teacher_model_server": "http://a:1", "gkd_logits_topk": 4},
    {"lmbda": 0.0, "teacher_model_server": SERVERS, "gkd_logits_topk": 4, "teacher_tag_key": "subject"},
    {"lmbda": 0.0},
    {"lmbda": 0.0, "teacher_model": "T", "teacher_placement": "separate", "teacher_world_size": 4},
    {"objective": "sft", "eval_dataset": ["e.jsonl"]},
    {"lmbda": 0.0, "teacher_model": "T", "eval_dataset": ["e.jsonl"], "eval_generate": 4},
    {"lmbda": 0.0, "teacher_model": "T", "packing": True, "streaming": True},
    {"lmbda": 0.0, "teacher_model": "T", "eval_dataset": ["e.jsonl"], "shuffle": False},
    *({"lmbda": 0.0, "teacher_model": "T", "recompute_granularity": kind} for kind in ("selective", "full")),
    {"lmbda": 0.0, "teacher_model": "T", "overlap_grad_reduce": True, "overlap_param_gather": True},
    {"lmbda": 0.0, "teacher_model": "T", "pipeline_model_parallel_size": 2},
    {"lmbda": 0.0, "teacher_model": "T", "tuner_type": "lora", "lora_rank": 4, "target_modules": ["v_proj"]},
    {"lmbda": 0.0, "teacher_model": "S", "tuner_type": "lora", "lora_alpha": 4.0, "eval_dataset": ["e.jsonl"]},
)


def generate(rng: random.Random) -> dict[str, Any]:
    given = dict(rng.choice(SCENES))
    for flag in rng.sample(sorted(VALUES), rng.randrange(1, 5)):
        given[flag] = rng.choice(VALUES[flag])
    return given


def says_the_default(flag: str, config: RunConfig) -> bool:
    """Values that say what holds anyway."""
    value, student = config.get(flag), flag.removeprefix("teacher_")
    if flag in (
        "teacher_tensor_model_parallel_size",
        "teacher_pipeline_model_parallel_size",
        "teacher_context_parallel_size",
        "teacher_micro_batch_size",
        "teacher_expert_model_parallel_size",
    ):
        return bool(value == config.get(student))
    if flag in ("expert_tensor_parallel_size", "teacher_expert_tensor_parallel_size"):
        tensor = flag.replace("expert_tensor", "tensor_model")
        others = [config.get(student) if flag != student else None, config.get(tensor)]
        return value == next((size for size in others if size is not None), config.get("tensor_model_parallel_size"))
    if flag == "recompute_modules":
        return value == ["core_attn"]
    if flag in ("cross_entropy_loss_fusion", "finetune"):  # another value, or another --load, is refused
        return True
    if (flag.endswith("_fusion") or flag == "moe_grouped_gemm") and value is False:  # on a CPU
        return True
    explicit: dict[str, Any] = dict(
        recompute_method="uniform",
        recompute_num_layers=1,
        loss_path="fused",
        use_liger_kernel=True,
        virtual_pipeline_model_parallel_size=1,
        device="cpu",
    )
    return flag in explicit and value == explicit[flag]


def judge(command: Command, given: dict[str, Any], arch: Any) -> tuple[str, list[str]]:
    """How a combination ended, and its flags without an effect that nobody names, or that are named and have one."""
    from tests.support.resolved import APART, resolved

    def outcome(values: dict[str, Any]) -> Any:
        """None: refused."""
        try:
            config = RunConfig.from_flat({"model": "S", "dataset": ["a.jsonl", "b.jsonl"]} | values)
            config.validate(command)
            return config, resolved(config, command, arch)
        except GKDError:
            return None

    whole = outcome(given)
    if whole is None:
        return "refused", []
    config, plan = whole
    named = {name for names in without_effect(config, command).values() for name in names}
    wrong = []
    for flag in given:
        if config.is_default(flag) or (flag in APART and command == "train"):
            continue
        without = outcome({name: value for name, value in given.items() if name != flag})
        changes = without is None or without[1] != plan
        if without is not None and changes and flag in named:  # it may be what another flag needs to be accepted
            wrong.append(f"--{flag} {config.get(flag)} is named and changes {_parts(plan, without[1])}: {given}")
        if not changes and flag not in named and not says_the_default(flag, config):
            wrong.append(f"--{flag} {config.get(flag)} changes nothing and is not named: {given}")
    return "named" if named else "in force", wrong


def _parts(plan: dict[str, Any], without: dict[str, Any]) -> list[str]:
    return sorted(name for name in plan if plan[name] != without.get(name))


def judge_all(command: Command, directory: str, number: int) -> tuple[Counter[str], list[str]]:
    """On a rank."""
    import os

    from tests.support.resolved import longer

    here, ends, wrong = os.getcwd(), Counter[str](), list[str]()
    os.chdir(directory)
    arch = longer(read(Path(directory)))
    try:
        with patch.object(contradictions, "find_spec", lambda name: object()):
            for seed in range(number):
                given = generate(random.Random(f"{command} {seed}"))
                if command == "eval":
                    given.setdefault("eval_dataset", ["e.jsonl"])
                end, found = judge(command, given, arch)
                ends[end] += 1
                wrong += found
    finally:
        os.chdir(here)
    return ends, wrong


def test_every_flag_has_values() -> None:
    assert set(VALUES) == set(flags()) - {"model", "dataset"}


@pytest.mark.parametrize("command", ["train", "eval"])
def test_no_flag_is_silent(tmp_path: Path, command: Command) -> None:
    (tmp_path / "S").mkdir()
    (tmp_path / "T").mkdir()
    ((ends, wrong),) = run_ranks(judge_all, command, str(tmp_path), NUM if command == "train" else NUM // 3, world=1)
    assert wrong == []
    assert min(ends.values()) > 3, ends
