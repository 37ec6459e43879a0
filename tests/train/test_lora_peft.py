"""What peft makes of our adapters: `what_peft_changes` says it, and peft itself is asked (GKD_TEST_FULL=1).

Adapters that peft loads as they are: test_lora_exact.py, whose truth it is. Not covered: other versions of peft.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.model.lora import Lora
from megatron_gkd.weights.adapters import check_targets, leaf_names, what_peft_changes
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_lora import adapted, write_adapter
from tests.support.dense_step import completion_logits, load
from tests.support.effort import FULL
from tests.support.models import small
from tests.support.numerics import Float64
from tests.support.peft_itself import need_peft, with_peft
from tests.support.ranks import run_ranks
from tests.support.trainers import make_samples

SAMPLES = make_samples([(4, 9), (2, 5)], vocab_size=300)
# Family, --target_modules, --use_rslora, what is said; "": it is bit for bit ours.
CASES: list[tuple[str, list[str], bool, str]] = [
    ("mixtral", ["all-linear"], False, ""),
    ("mixtral", ["q_proj", "w2"], True, ""),
    ("qwen3", ["all-linear"], True, ""),
    ("olmoe", ["all-linear"], False, ""),
    ("deepseek_v3", ["q_a_proj", "kv_b_proj", "o_proj"], False, ""),
    ("mixtral", ["w1", "w2"], False, "it takes both or none, and w1 stands alone"),
    ("qwen3_moe", ["gate_proj", "up_proj"], True, r"by another sqrt\(2\)"),
    ("deepseek_v3", ["all-linear"], False, "leaves out the adapters of shared experts"),
    ("qwen2_moe", ["gate_proj", "up_proj", "down_proj"], False, "leaves out the adapters of shared experts"),
]


@pytest.mark.parametrize(("family", "modules", "rslora", "said"), CASES)
def test_what_peft_makes_of_it_is_known(family: str, modules: list[str], rslora: bool, said: str) -> None:
    arch, lora = small(family), Lora(2, 4.0, rslora)
    check_targets(arch, lora, modules)
    assert re.search(said + "$" if said else "^$", what_peft_changes(arch, lora, modules))


@torch.no_grad()
def compared(cells: list[tuple[str, str]]) -> list[float | str]:
    """By (model, adapter): how far peft's logits are from the formula's, relative to what the adapter changes; or what
    peft says where it does not load it."""

    def logits(model: Any) -> torch.Tensor:
        return torch.cat([completion_logits(model, sample) for sample in SAMPLES])

    found: list[float | str] = []
    with Float64():
        for path, adapter in cells:
            base = logits(load(path, torch.float64))
            ours = logits(adapted(load(path, torch.float64), adapter)[0])
            try:
                theirs = logits(with_peft(load(path, torch.float64), adapter))
            except (RuntimeError, ValueError, KeyError) as error:
                found.append(f"{type(error).__name__}: {error}")
            else:
                found.append(float((theirs - ours).abs().max() / (ours - base).abs().max()))
    return found


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_peft_makes_of_it_what_is_said(tmp_path: Path) -> None:
    need_peft()
    cells = []
    for number, (family, modules, rslora, _) in enumerate(CASES):
        model = tmp_path / family
        if not model.exists():
            write_tiny_checkpoint(model, family, layers=2, hidden_size=32, ffn_hidden_size=48, seed=number)
        chosen = leaf_names(read_architecture(model), modules)
        adapter = write_adapter(tmp_path / f"adapter_{number}", model, rank=2, alpha=4.0, rslora=rslora, modules=chosen)
        cells.append((str(model), adapter))
    (found,) = run_ranks(compared, cells, world=1, fresh=True)
    for (family, modules, _, said), of_peft in zip(CASES, found, strict=True):
        what = f"{family}, {modules}: {of_peft}"
        if "stands alone" in said:
            assert isinstance(of_peft, str), what
        else:
            assert isinstance(of_peft, float), what
            assert of_peft > 1e-2 if said else of_peft < 1e-12, what
