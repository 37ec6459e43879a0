"""Checks that a model can be split over a layout."""

from __future__ import annotations

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import LayoutError
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.pipeline_split import PipelineSplit


def check_fit(flag: str, arch: Architecture, layout: Layout) -> None:
    """`check_in` for the model of `--flag`, which the error then names."""
    try:
        check_in(arch, layout)
    except LayoutError as error:
        raise LayoutError(f"--{flag}: {error}") from error


def check_in(arch: Architecture, layout: Layout) -> None:
    """`check_layout` for a Layout."""
    check_layout(
        arch,
        layout.tensor,
        layout.pipeline,
        layout.virtual_pipeline,
        ep=layout.expert,
        etp=layout.expert_tensor_size,
        split=layout.split,
    )


def check_layout(
    arch: Architecture,
    tp: int,
    pp: int,
    vpp: int | None = None,
    *,
    ep: int = 1,
    etp: int | None = None,
    split: PipelineSplit | None = None,
) -> None:
    """Raise LayoutError, with the reason and the sizes that would do, unless the model divides over this layout."""
    chunks = vpp or 1
    etp = tp if etp is None else etp
    if min(tp, pp, chunks, ep, etp) < 1:
        raise LayoutError(
            f"parallel sizes must be at least 1; given tensor {tp}, pipeline {pp}, virtual pipeline {vpp}, "
            f"expert {ep}, expert tensor {etp}"
        )
    _check_experts(arch, tp, ep, etp)
    if arch.num_heads % tp != 0:
        raise LayoutError(_does_not_divide("tensor", tp, arch.num_heads, "attention heads"))
    if arch.qk_norm_over_heads and arch.num_kv_heads % tp != 0:
        raise LayoutError(_does_not_divide("tensor", tp, arch.num_kv_heads, "key/value heads, normalised together"))
    if arch.num_kv_heads % tp != 0 and tp % arch.num_kv_heads != 0:
        raise LayoutError(
            f"tensor-parallel size {tp} neither divides the {arch.num_kv_heads} key/value heads nor is their multiple"
        )
    dense = arch.moe is None or len(arch.moe.layers) < arch.num_layers
    if dense and arch.ffn_hidden_size % tp != 0:
        raise LayoutError(_does_not_divide("tensor", tp, arch.ffn_hidden_size, "rows of the MLP (intermediate_size)"))
    if arch.latent is not None:
        _check_latent(arch, tp)
    elif (arch.query_size + 2 * arch.kv_size) % tp != 0:
        raise LayoutError(_does_not_divide("tensor", tp, arch.query_size + 2 * arch.kv_size, "rows of q, k and v"))
    if chunks > 1 and pp == 1:
        raise LayoutError(f"virtual pipeline size {vpp} needs a pipeline-parallel size of at least 2")
    if split is not None:
        split.chunk_layers(arch.num_layers, pp, chunks)
    elif arch.num_layers % (pp * chunks) != 0:
        what = "pipeline" if chunks == 1 else f"virtual pipeline ({pp} stages x {chunks} chunks)"
        raise LayoutError(_does_not_divide(what, pp * chunks, arch.num_layers, "decoder layers"))


def _check_latent(arch: Architecture, tp: int) -> None:
    """megatron-core's constructor shards the down projections; ours replace them later (latent_attention.py)."""
    assert arch.latent is not None
    for size in (arch.latent.query_rank or 0, arch.latent.kv_rank + arch.latent.rotary_dim):
        if size % tp != 0:
            raise LayoutError(_does_not_divide("tensor", tp, size, "elements of a latent vector"))


def _check_experts(arch: Architecture, tp: int, ep: int, etp: int) -> None:
    if arch.moe is None:
        if ep > 1:
            raise LayoutError(f"expert-parallel size {ep}: a {arch.model_type} model has no experts; use 1")
        if etp != tp:
            raise LayoutError(
                f"expert-tensor-parallel size {etp}: a {arch.model_type} model has no experts; leave it out"
            )
    elif arch.moe.num_experts % ep != 0:
        raise LayoutError(_does_not_divide("expert", ep, arch.moe.num_experts, "experts"))
    elif arch.moe.shared_ffn_hidden_size % tp != 0:
        raise LayoutError(_does_not_divide("tensor", tp, arch.moe.shared_ffn_hidden_size, "rows of the shared experts"))
    elif arch.moe.ffn_hidden_size % etp != 0:
        what = "rows of an expert (moe_intermediate_size)"
        raise LayoutError(_does_not_divide("expert-tensor", etp, arch.moe.ffn_hidden_size, what))


def _does_not_divide(kind: str, size: int, total: int, what: str) -> str:
    fitting = [n for n in range(1, min(total, 64) + 1) if total % n == 0]
    return (
        f"{kind}-parallel size {size} does not divide the {total} {what}; sizes that do: {', '.join(map(str, fitting))}"
    )
