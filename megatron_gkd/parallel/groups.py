"""Process groups of a layout: a HyperCommGrid turned into megatron-core's ProcessGroupCollection.

Each model (student, teacher) has its own collection and passes it to every part of megatron-core as `pg_collection`.
megatron-core's global `parallel_state` is never initialised, so a call that would fall back to it fails at once instead
of using another model's groups.

Communication: creating groups is collective over the whole WORLD. All ranks call `build_groups` with the same
layouts in the same order.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.errors import LayoutError
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.platform import new_group, world_timeout


def build_groups(layout: Layout) -> ProcessGroupCollection:
    """All groups of one layout that megatron-core's model, schedules, DDP, optimizer and checkpointing use.

    Gradients, the optimizer's shards and the number of loss tokens are summed over `dp_cp`: the context-parallel ranks
    hold the same weights and different tokens. Without expert parallelism the expert groups equal the dense ones. Equal
    groups share one communicator instead of opening another.
    """
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        # Scratch for the all-gathers of sequence parallelism (tensor_parallel/layers.py). It belongs to no group,
        # but megatron-core makes it in initialize_model_parallel only, which this project never calls.
        parallel_state._set_global_memory_buffer()
    world = dist.get_world_size()
    if layout.rank_offset + layout.world_size > world:
        raise LayoutError(
            f"layout {layout.describe()} needs ranks up to {layout.rank_offset + layout.world_size - 1}, the world "
            f"has {world}"
        )
    grid = HyperCommGrid(
        [layout.tensor, layout.context, 1, layout.data, layout.pipeline],
        ["tp", "cp", "ep", "dp", "pp"],
        rank_offset=layout.rank_offset,
    )
    group_over = _Partitions(grid)
    groups = ProcessGroupCollection()
    groups.tp = group_over("tp")
    groups.cp = group_over("cp")
    groups.dp = group_over("dp")
    groups.pp = group_over("pp")
    groups.mp = group_over("tp", "pp")
    groups.dp_cp = group_over("cp", "dp")
    groups.tp_cp = group_over("tp", "cp")
    groups.tp_dp_cp = group_over("tp", "cp", "dp")
    groups.intra_dp_cp = groups.dp_cp
    groups.ep = group_over("ep")
    _add_expert_groups(groups, layout)
    # One distributed-optimizer instance: its gradient statistics span the whole layout (optimizer/__init__.py,
    # grad_stats_parallel_group).
    groups.intra_dist_opt = group_over("tp", "cp", "dp", "pp")
    groups.inter_dist_opt = None
    groups.embd = _embedding_group(layout, grid, groups.pp)
    groups.pos_embd = None  # for learned position embeddings, which no model here has
    return groups


def _add_expert_groups(groups: ProcessGroupCollection, layout: Layout) -> None:
    if layout.expert == 1 and layout.expert_tensor_size == layout.tensor:
        groups.expt_tp = groups.tp
        groups.expt_dp = groups.dp_cp
        groups.tp_ep = groups.tp
        groups.tp_ep_pp = groups.mp
    else:
        group_over = _Partitions(
            HyperCommGrid(
                [layout.expert_tensor_size, layout.expert, layout.expert_data, layout.pipeline],
                ["tp", "ep", "dp", "pp"],
                rank_offset=layout.rank_offset,
            )
        )
        groups.ep = group_over("ep")
        groups.expt_tp = group_over("tp")
        groups.expt_dp = group_over("dp")
        groups.tp_ep = group_over("tp", "ep")
        groups.tp_ep_pp = group_over("tp", "ep", "pp")
    groups.intra_expt_dp = groups.expt_dp


class _Partitions:
    """Groups over dimensions of a grid, one communicator for each partition of the ranks: with sizes of 1 many
    dimensions divide the ranks alike (at TP 1 x PP 2 x DP 1 nine groups are two), and a communicator costs threads,
    sockets and device memory. Sharing is safe because the parts of a training step that use them never overlap.
    """

    def __init__(self, grid: HyperCommGrid) -> None:
        self._grid = grid
        self._made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def __call__(self, *dims: str) -> dist.ProcessGroup:
        partition = tuple(sorted(tuple(sorted(ranks)) for ranks in self._grid.get_rank_enum(list(dims))))
        if partition not in self._made:
            self._made[partition] = self._grid.create_pg(list(dims), timeout=world_timeout())
        return self._made[partition]


def _embedding_group(layout: Layout, grid: HyperCommGrid, pp_group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """First and last stage of this rank's pipeline, for the gradients of tied embeddings; None on other stages."""
    if layout.pipeline <= 2:
        return pp_group
    embedding = None
    for stages in grid.get_rank_enum("pp"):
        ends = [stages[0], stages[-1]]
        group = new_group(ends)
        if dist.get_rank() in ends:
            embedding = group
    return embedding
