"""The collectives of the losses: thin, documented wrappers around torch.distributed.

Every function requires the process group; None raises, because torch.distributed reads None as WORLD. With one rank
there is no communication. `R` = ranks of the group.

| function | op | effect on the input | result |
|---|---|---|---|
| `all_reduce_sum_(x, group)` | all-reduce SUM | overwritten | x |
| `all_gather_stack(x, group)` | all-gather | untouched | new tensor [R, *x.shape], ranks in order, alike on all |

Invariants: shapes and dtypes are alike on all ranks of the group (not checked: a check would be a collective), and
nothing here is differentiable. A loss states its own gradient; autograd never sees a collective.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError


def require_group(group: dist.ProcessGroup | None, name: str = "tp_group") -> dist.ProcessGroup:
    """Returns `group`. Raises ConfigError if it is None or does not contain this rank."""
    if group is None:
        raise ConfigError(
            f"{name}=None was given, a process group is needed (None would silently mean all ranks); "
            f"for no parallelism pass a one-rank group: torch.distributed.new_group([rank])"
        )
    if not isinstance(group, dist.ProcessGroup):  # GroupMember.NON_GROUP_MEMBER is a plain object
        raise ConfigError(
            f"{name}={group!r} was given, a process group that contains this rank is needed; "
            f"pass the group that new_group returned on this rank's own list of ranks"
        )
    return group


def all_reduce_sum_(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum `x` over the group, in place.

    Communication: 1 all-reduce SUM of x over `group` (none on a group of one rank). Overwrites x.
    """
    if group.size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def all_gather_stack(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The group's tensors, stacked in group-rank order: [R, *x.shape].

    Communication: 1 all-gather of x over `group` (none on a group of one rank). x is untouched.
    """
    if group.size() == 1:
        return x.unsqueeze(0)
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    gather = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # renamed, old name deprecated, in torch 2.13
    gather(out, x.contiguous(), group=group)
    return out.view(group.size(), *x.shape)
