"""vLLM takes the tensors of Qwen2-MoE, OLMoE, GLM-4 MoE and DeepSeek-V3 under the names that are pushed to it, and then
computes what transformers does.

As test_bridge.py, whose checks these are; with GKD_TEST_FULL=1 alone. Does not cover: GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.parallel.layout import Layout
from tests.rollout.test_bridge import TIMEOUT_S, check_all
from tests.support.bridging import Cell, push_everywhere
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow

# vLLM's kernels on a CPU want heads of 32 or more numbers. It has an epsilon of 1e-5 in OLMoE's norms of queries and
# keys, whatever config.json says.
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_moe": dict(hidden_size=128),
    "olmoe": dict(hidden_size=128, rms_norm_eps=1e-5),
    "glm4_moe": dict(head_dim=32),
    # The one size that its latent attention has on a CPU, which is that of every published model.
    "deepseek_v3": dict(hidden_size=128, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32),
}


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1: an engine for each family")
@pytest.mark.parametrize("family", OPTIONS)
def test_a_push(tmp_path: Path, family: str) -> None:
    paths = [write_tiny_checkpoint(tmp_path / str(seed), family, seed=seed, **OPTIONS[family]) for seed in range(3)]
    cells = [Cell(family, Layout(), 1)]
    found = run_ranks(push_everywhere, {family: paths}, cells, world=1, timeout_s=TIMEOUT_S, with_vllm=True)
    check_all(found, 2)
