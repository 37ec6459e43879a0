"""Process groups of a layout: a HyperCommGrid turned into megatron-core's ProcessGroupCollection.

Every model of the program (student, teacher) gets a collection of its own and passes it to every megatron-core part as
`pg_collection`; megatron-core's global `parallel_state` is never initialised, so a call that would fall back to it
fails at once instead of using another model's groups.

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


def build_groups(layout: Layout) -> ProcessGroupCollection:
    """All groups that megatron-core's model, schedules, DDP, optimizer and checkpointing read, for one layout.

    The context size is 1 (see layout.py), so its groups hold one rank and data x context equals data; without expert
    parallelism the expert groups equal the dense ones. Equal groups share one communicator instead of opening another.
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
        [layout.tensor, layout.context, layout.data, layout.pipeline],
        ["tp", "cp", "dp", "pp"],
        rank_offset=layout.rank_offset,
    )
    groups = ProcessGroupCollection()
    groups.tp = grid.create_pg("tp")
    groups.cp = grid.create_pg("cp")
    groups.dp = grid.create_pg("dp")
    groups.pp = grid.create_pg("pp")
    groups.mp = grid.create_pg(["tp", "pp"])
    groups.dp_cp = groups.dp
    groups.tp_cp = groups.tp
    groups.tp_dp_cp = grid.create_pg(["tp", "dp"])
    groups.intra_dp_cp = groups.dp
    _add_expert_groups(groups, layout)
    # One distributed-optimizer instance: its gradient statistics span the whole layout (optimizer/__init__.py,
    # grad_stats_parallel_group).
    groups.intra_dist_opt = grid.create_pg(["tp", "cp", "dp", "pp"])
    groups.inter_dist_opt = None
    groups.embd, groups.pos_embd = _embedding_groups(grid)
    return groups


def _add_expert_groups(groups: ProcessGroupCollection, layout: Layout) -> None:
    if layout.expert == 1 and layout.expert_tensor_size == layout.tensor:
        groups.ep = groups.cp
        groups.expt_tp = groups.tp
        groups.expt_dp = groups.dp
        groups.tp_ep = groups.tp
        groups.tp_ep_pp = groups.mp
    else:
        grid = HyperCommGrid(
            [layout.expert_tensor_size, layout.expert, layout.expert_data, layout.pipeline],
            ["tp", "ep", "dp", "pp"],
            rank_offset=layout.rank_offset,
        )
        groups.ep = grid.create_pg("ep")
        groups.expt_tp = grid.create_pg("tp")
        groups.expt_dp = grid.create_pg("dp")
        groups.tp_ep = grid.create_pg(["tp", "ep"])
        groups.tp_ep_pp = grid.create_pg(["tp", "ep", "pp"])
    groups.intra_expt_dp = groups.expt_dp


def _embedding_groups(grid: HyperCommGrid) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """First + last stage of each pipeline (tied embeddings' gradients), and first stage alone (position embeddings)."""
    embedding = position = None
    rank = dist.get_rank()
    for stages in grid.get_rank_enum("pp"):
        ends = sorted({stages[0], stages[-1]})
        ends_group = dist.new_group(ends)
        first_group = dist.new_group([stages[0]])
        if rank in ends:
            embedding = ends_group
        if rank == stages[0]:
            position = first_group
    return embedding, position
