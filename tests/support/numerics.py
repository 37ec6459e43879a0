"""How far a float32 result may be from the truth, on any CPU: a few times as far as another implementation's.

"Logits to 1e-5" is a statement about one CPU: vector width, the BLAS library's choice of kernels and the order of sums
differ on the next one, and so does the error. What holds everywhere is measured on the spot, model by model:

    |ours - truth|  <=  FACTOR * |reference - truth|  +  FLOOR * eps * |truth|        (each the largest element)

truth      the same numbers in float64 arithmetic throughout (below): its own error is 1e-9 of what is compared
reference  the same numbers by transformers and torch in float32, on this machine, with this machine's kernels
FACTOR     both add up the same terms in another order, so their errors have one distribution; the largest of many of
           one is within three times the largest of many of the other
FLOOR      a reference may be exact by luck, where it is one number or a few. Ours is a float32 that has been summed
           over micro-batches and ranks, divided and written: each rounds by eps / 2 at most

A tensor can be "a few numbers" too: the gradient of an expert that got two tokens is the sum of two outer products, and
one factor that the reference happened to round well makes its whole error small. Of ten thousand tensors some are such.
So where ours is further off than allowed, but not DOUBTFUL times as far, a training step is carried out in float32
REPEATS more times, each with weights moved by up to half a unit in the last place (`rounded_anew`), and the reference's
error is the largest of all.

A fault is not within it: the tests plant some of the smallest (an epsilon, a rotary base 0.1 % off) and find them far
outside. Transformers in float64 is no truth as it is: norms, softmax, routers and rotary angles go to float32 by name.
`Float64` is a mode in which that name means float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

EPS: Final = torch.finfo(torch.float32).eps
FACTOR: Final = 3.0
FLOOR: Final = 8.0
REPEATS: Final = 3
DOUBTFUL: Final = 10.0  # times the allowed error: no luck of a reference explains more


def largest_error(found: torch.Tensor | float, truth: torch.Tensor | float) -> float:
    """The largest element of |found - truth|, 0 of none; infinite where one is not finite. Shapes must be the same."""
    one, other = (torch.as_tensor(x, dtype=torch.float64) for x in (found, truth))
    assert one.shape == other.shape, f"{tuple(one.shape)} against {tuple(other.shape)}"
    return float((one - other).abs().nan_to_num(nan=torch.inf).max()) if one.numel() else 0.0


def allowed_error(
    reference: torch.Tensor | float, truth: torch.Tensor | float, *, factor: float = FACTOR, floor: float = FLOOR
) -> float:
    """The right side of the rule: how far from `truth` a float32 result may be."""
    scale = float(torch.as_tensor(truth, dtype=torch.float64).abs().max())
    return factor * largest_error(reference, truth) + floor * EPS * scale


def error_ratio(
    found: torch.Tensor | float,
    reference: torch.Tensor | float,
    truth: torch.Tensor | float,
    *,
    factor: float = FACTOR,
    floor: float = FLOOR,
) -> float:
    """The error over the allowed one: at most 1 for a right result."""
    allowed = allowed_error(reference, truth, factor=factor, floor=floor)
    error = largest_error(found, truth)
    return error / allowed if allowed else (0.0 if error == 0 else float("inf"))


def within_reference_error(
    found: torch.Tensor | float,
    reference: torch.Tensor | float,
    truth: torch.Tensor | float,
    what: object = "",
    *,
    factor: float = FACTOR,
    floor: float = FLOOR,
) -> None:
    """Assert the rule of the module's docstring."""
    ratio = error_ratio(found, reference, truth, factor=factor, floor=floor)
    assert ratio <= 1, (
        f"{what}: {largest_error(found, truth):.3e} from the truth, the reference {largest_error(reference, truth):.3e}"
        f"; {ratio:.2f} times what is allowed"
    )


class Float64(TorchFunctionMode):
    """Within it, code that asks torch for float32 by name gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def transformers_model(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in evaluation mode, a copy of one's own; in float64 it must be called within `Float64`."""
    stored = tuple((file.name, file.stat().st_mtime_ns) for file in sorted(Path(path).iterdir()))
    return with_rounding(copy.deepcopy(_loaded(str(path), dtype, stored, torch._C._len_torch_function_stack())))


ROUNDING: Final = ContextVar("ROUNDING", default=0)  # which; 0: the weights as they are stored


@contextmanager
def rounded_anew(seed: int) -> Iterator[None]:
    """Within it, a model in float32 that is loaded here has each weight w as w (1 + u), |u| <= eps / 2, by the seed."""
    token = ROUNDING.set(seed)
    try:
        yield
    finally:
        ROUNDING.reset(token)


@torch.no_grad()
def with_rounding(model: Any) -> Any:
    """The model, its weights moved as `rounded_anew` says."""
    if (seed := ROUNDING.get()) and model.dtype == torch.float32:
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            moved = 1 + EPS * (torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 0.5)
            weight.copy_(weight.double() * moved)
    return model


@lru_cache(maxsize=8)
def _loaded(path: str, dtype: torch.dtype, stored: object, modes: int) -> Any:
    """Kept for the next caller: a copy takes a tenth of the time. The last two tell other contents and modes apart."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = dict(dtype=dtype, attn_implementation="eager", local_files_only=True)
    if dtype == torch.float64:
        options["experts_implementation"] = "eager"  # the grouped product of experts knows no float64
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    if dtype == torch.float64:
        with Float64():
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # rotary frequencies in float64
    return model


@torch.no_grad()
def reference_and_truth(path: str | Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' logits [B, S, V] in float32 and in float64.

    The router of a mixture must not stand between two experts: where rounding decides, results are apart by whole
    experts, and neither is wrong.
    """
    reference = transformers_model(path)(ids).logits
    model = transformers_model(path, torch.float64)
    experts = getattr(model.config, "num_experts_per_tok", None)
    with Float64():
        out = model(ids, output_router_logits=True) if experts else model(ids)
    assert out.logits.dtype == torch.float64
    if experts:
        margin = routing_margin(out.router_logits, experts)
        assert margin > LEAST_MARGIN, f"{path}: {margin:.1e} between a chosen and another expert: take another seed"
    return reference, out.logits


LEAST_MARGIN: Final = 1e-5  # of probabilities, which rounding changes by 1e-6 at most


def routing_margin(router_logits: Any, experts: int) -> float:
    """The least gap between the probability of the last expert that is chosen and the first that is not."""
    best = torch.cat(list(router_logits)).softmax(-1).topk(experts + 1, dim=-1).values
    return float((best[:, -2] - best[:, -1]).min())
