"""peft, as the truth about adapters: a step of `PeftModel` on transformers' model, and its logits.

    (steps,) = run_ranks(peft_steps, [positional arguments of dense_lora_step, ...], topk, world=1, fresh=True)

In a process of its own: it finds peft in the environment of ms-swift (requirements/swift.txt, tests/setup_swift.sh),
whose packages the project and its other tests do not see. `need_peft` skips a test where that is missing, or fails it
(GKD_REQUIRE_SWIFT=1).

transformers holds the experts of a layer in two tensors; there peft has one adapter each, of all experts, with twice
the rank for gate and up. `_of_experts` takes them apart. What of B is off the diagonal (gate's rows times
up's A) is 0 and has a gradient there, which is left out: no matrix of the file has it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from megatron_gkd.records import Sample
from tests.support.dense_lora import EMBEDDING, HEAD, PREFIX, Trained, dense_lora_step, names_of_experts
from tests.support.dense_step import DenseStep, completion_logits, load
from tests.support.numerics import Float64
from tests.support.ranks import run_ranks

PACKAGES = Path(sysconfig.get_path("purelib", vars={"base": str(Path(sys.prefix) / "swift")}))


def need_peft() -> None:
    """For a test, before it asks for peft."""
    if not (PACKAGES / "peft").exists():
        said = f"there is no peft in {PACKAGES}; bash tests/setup_swift.sh installs it"
        (pytest.fail if os.environ.get("GKD_REQUIRE_SWIFT") == "1" else pytest.skip)(said)


def with_peft(model: Any, adapter: str | Path) -> Any:
    """The model with an adapter that is trained, by peft."""
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    from peft import PeftModel

    with torch._C.DisableTorchFunction():  # files are not read in Float64's mode
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True, autocast_adapter_dtype=False)


def peft_steps(cells: Sequence[tuple[Any, ...]], topk: int) -> list[DenseStep]:
    """`dense_lora_step` of each cell's arguments, with peft's modules in place of the formula. Before it, adapters
    without experts are saved by peft, beside the given ones: `saved_by_peft`."""
    steps = [dense_lora_step(*cell, topk=topk, put_on=_trained_by_peft) for cell in cells]
    return [
        _with_tied_head(replace(step, again=_AgainElsewhere(cell, topk)), cell[2])
        for step, cell in zip(steps, cells, strict=True)
    ]


class _AgainElsewhere:
    """The references of one cell that are rounded anew, once they are asked for; can be sent."""

    def __init__(self, cell: tuple[Any, ...], topk: int) -> None:
        self._asked, self._found = (cell, topk), list[DenseStep]()

    def __call__(self) -> list[DenseStep]:
        if not self._found:
            (self._found,) = run_ranks(_again, *self._asked, world=1, fresh=True)
        return self._found


def _again(cell: tuple[Any, ...], topk: int) -> list[DenseStep]:
    """In a process that finds peft."""
    step = dense_lora_step(*cell, topk=topk, put_on=_trained_by_peft)
    assert step.again is not None
    return [_with_tied_head(one, cell[2]) for one in step.again()]


def saved_by_peft(adapter: str) -> Path:
    """The same adapter in peft's own files."""
    return Path(f"{adapter}_by_peft")


def peft_logits(model: str | Path, adapter: str | Path, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """[sum of C, V] of the adapter on the model, in float32 and in float64."""

    @torch.no_grad()
    def logits(dtype: torch.dtype) -> torch.Tensor:
        adapted = with_peft(load(str(model), dtype), adapter)
        return torch.cat([completion_logits(adapted, sample) for sample in samples])

    reference = logits(torch.float32)
    with Float64():
        return reference, logits(torch.float64)


def _trained_by_peft(model: Any, adapter: str) -> tuple[Any, Callable[[], Trained]]:
    adapted = with_peft(model, adapter)
    if model.dtype == torch.float32 and not any(".experts." in name for name, _ in model.named_parameters()):
        adapted.save_pretrained(saved_by_peft(adapter))

    def trained() -> Trained:
        found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                name = name.replace(".modules_to_save.default", "").replace(".default", "")
                if ".experts." in name:
                    values, gradients = (
                        _of_experts(adapted, name, tensor) for tensor in (parameter.detach(), parameter.grad)
                    )
                    found |= {one: (value, gradients[one]) for one, value in values.items()}
                else:
                    found[name] = parameter.detach(), parameter.grad
        return found

    return adapted, trained


def _of_experts(adapted: Any, name: str, tensor: Any) -> dict[str, torch.Tensor]:
    """The parts of a tensor of all experts, by each matrix's name in the file.

    With `base_layer` in its name it is gate's and up's, A [E 2 r, H] and B [2 I, 2 r E]; without, down's, A [E r, I]
    and B [H, r E]. Columns of B are ordered by rank, then by expert.
    """
    module_name, kind = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
    module = adapted.get_base_model().get_submodule(module_name.removesuffix(".base_layer"))
    while hasattr(module, "base_layer"):
        module = module.base_layer
    names = names_of_experts(adapted.get_base_model(), module_name.removesuffix(".base_layer"), module)
    if kind == "lora_A":
        of_experts = tensor.unflatten(0, (len(names), -1))
    else:
        of_experts = tensor.T.unflatten(0, (-1, len(names))).permute(1, 2, 0)
    found = {}
    for (pair, down), of_one in zip(names, of_experts, strict=True):
        if not module_name.endswith(".base_layer"):
            found[down] = of_one
        elif kind == "lora_A":
            found |= dict(zip(pair, of_one.chunk(2), strict=True))
        else:
            (gate, _), (_, up) = (rows.chunk(2, dim=1) for rows in of_one.chunk(2))
            found |= dict(zip(pair, (gate, up), strict=True))
    return {f"{PREFIX}{one}.{kind}.weight": part for one, part in found.items()}


def _with_tied_head(step: DenseStep, adapter: str) -> DenseStep:
    """The file names a tied embedding twice; the model has it once."""
    with safe_open(Path(adapter) / "adapter_model.safetensors", framework="pt") as file:
        if PREFIX + HEAD not in file.keys() or PREFIX + HEAD in step.weights:  # noqa: SIM118
            return step

    def named(one: DenseStep) -> DenseStep:
        weights, gradients = ({**x, PREFIX + HEAD: x[PREFIX + EMBEDDING]} for x in (one.weights, one.gradients))
        return replace(one, weights=weights, gradients=gradients, reference=one.reference and named(one.reference))

    return named(step)
