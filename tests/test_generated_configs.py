"""Generated config.json files, seeded: every option that is added, changed or removed is used (it changes the
architecture that is built), or refused, or changes nothing in transformers' own model either.

The judge is transformers: a model of the changed configuration, with the weights of the plain one, gives the same
logits, wherever read_architecture has taken the change for one that changes nothing. What it does with options that do
change the model is compared by tests/weights. Not covered: combinations of more than three changes.
"""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import _REAL, _TRUTH, _WHOLE, Architecture, read_architecture
from megatron_gkd.errors import GKDError
from megatron_gkd.model.known_options import _HARMLESS, _JUDGED, _JUDGED_OF, _ONLY
from tests.support.checkpoints import MIXTURES, OF_MIXTURES
from tests.support.effort import FULL, count
from tests.test_architecture import LLAMA, of_family

pytestmark = pytest.mark.timeout(600)

NUM = count(16, 400)  # a family
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", *(MIXTURES if FULL else ()))
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    **OF_MIXTURES,
}
# Names of other families, of tomorrow, of training, and misspelt ones.
FOREIGN = (
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "clip_qkv", "scale_emb"),
    *(
        "scale_depth",
        "query_pre_attn_scalar",
        "use_parallel_residual",
        "layer_norm_eps",
        "norm_eps",
        "n_layer",
        "n_head",
    ),
    *("num_nextn_predict_layers", "kv_lora_rank", "rope_interleave", "no_rope_layers", "attention_chunk_size"),
    *("final_logit_softcapping", "is_causal", "use_qk_norm", "qk_layernorm", "rotary_pct", "hidden_activation"),
    *("add_bias_linear", "post_layer_norm", "mup_enabled", "sinks", "num_heads", "rms_norm_epsilon", "tie_embeddings"),
)
ROPE_VALUES: tuple[Any, ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5000.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"type": "linear", "factor": 2.0, "mrope_section": [1, 2]},
)
VALUES_OF_LAYERS: tuple[Any, ...] = (["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"] * 4)
VALUES: tuple[Any, ...] = (
    *ROPE_VALUES,
    *VALUES_OF_LAYERS,
    *(None, True, False, 0, 1, 2, 3, 4, 8, 64, 96, 256, 300, -1, 0.0, 0.5, 1.0, 2.0, 1e-5, 1e-6, 10000.0, 1e6),
    *("", "silu", "gelu", "linear", "yarn", "default", "full_attention", "bfloat16", "x" * 50),
    *([], {}, [0], [1, 2]),
)


def base(family: str) -> dict[str, Any]:
    plain = dict(num_hidden_layers=2, max_position_embeddings=128) | (
        {"sliding_window": None} if family == "mistral" else {}
    )
    return LLAMA | of_family(family, **EXPERTS.get(family, {})) | plain


def fitting(name: str) -> tuple[Any, ...]:
    """Values of the option's own type."""
    if name in _TRUTH or name.startswith(("use_", "is_")):
        return True, False
    if name in _WHOLE or name in ("sliding_window", "max_window_layers"):
        return 1, 2, 4, 8, 16, 48, 64, 96, 256, 300
    if name in _REAL or name.endswith(("_theta", "_factor")):
        return 1e-6, 1e-5, 0.1, 1.0, 5000.0, 1e6
    kinds = {"hidden_act": ("silu", "gelu", "relu"), "layer_types": VALUES_OF_LAYERS}
    return kinds.get(name, ROPE_VALUES if name.startswith("rope_") else VALUES)


def generate(family: str, rng: random.Random) -> tuple[dict[str, Any], set[str]]:
    """A configuration, and the options in which it is another one than the plain."""
    plain, judged = base(family), sorted({*_JUDGED, *_JUDGED_OF.get(family, ()), *_ONLY})
    judged += ["rope_scaling", "rope_parameters"] * 4  # of the largest effect
    config = dict(plain)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.randrange(6)
        if kind == 0:
            config.pop(rng.choice(sorted(config)))
            continue
        names = (FOREIGN, sorted(_HARMLESS), sorted(plain), judged, judged)[kind - 1]
        name = rng.choice(names)
        config[name] = rng.choice(fitting(name) if rng.random() < 0.6 else VALUES)
    return config, {name for name in {*config, *plain} if config.get(name, ...) != plain.get(name, ...)}


def read(path: Path, config: dict[str, Any]) -> Architecture:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return read_architecture(path)


@cache
def weights(family: str) -> dict[str, torch.Tensor]:
    return dict(model_of(base(family), seed=1).state_dict())


def model_of(config: dict[str, Any], *, seed: int = 0) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {name: value for name, value in config.items() if name != "model_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = AutoConfig.for_model(config["model_type"], **options)
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(family: str, config: dict[str, Any]) -> torch.Tensor:
    """[60, V] of transformers' model of the configuration, with the weights of the plain one."""
    model = model_of(config)
    model.load_state_dict(weights(family))
    ids = torch.arange(60)[None] * 7 % LLAMA["vocab_size"]
    found: torch.Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_option_is_silent(tmp_path: Path, family: str) -> None:
    plain, wanted = read(tmp_path / "plain", base(family)), logits(family, base(family))
    ends, silent = Counter[str](), list[str]()
    for seed in range(NUM):
        config, changed = generate(family, random.Random(f"{family} {seed}"))
        if not changed:
            continue
        try:
            found = read(tmp_path / "changed", config)
        except GKDError:
            ends["refused"] += 1
            continue
        if found != plain:
            ends["used"] += 1
            continue
        ends["without effect"] += 1
        try:
            same = torch.allclose(logits(family, config), wanted, atol=1e-5)
        except RuntimeError:  # the weights have another shape there
            same = False
        except Exception:  # not silent where transformers itself cannot take it
            ends["not for transformers"] += 1
            continue
        if not same:
            silent.append(f"seed {seed}: { ({name: config.get(name, 'removed') for name in changed}) }")
    assert silent == []
    assert min(ends["refused"], ends["used"] + ends["without effect"]) > NUM // 10, ends
    assert ends["not for transformers"] < NUM // 4, ends


def test_the_judge_sees_a_difference(tmp_path: Path) -> None:
    """Options that change the model, taken for harmless, would be found."""
    wanted = logits("llama", base("llama"))
    for change in ({"rope_theta": 90000.0}, {"rms_norm_eps": 0.5}, {"hidden_act": "gelu"}):
        assert not torch.allclose(logits("llama", base("llama") | change), wanted, atol=1e-3), change
