"""The student's log-probabilities of given sequences, on every rank: the trainer's side of the check that the sampler
has the trainer's weights.

They are computed with the same chunks, schedules and vocab-parallel cross entropy as in training, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.loss.vocab_cross_entropy import vocab_parallel_cross_entropy
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import forward_hidden, run_schedule, select_loss_tokens
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample
from megatron_gkd.train.batches import Collator, plan_forward
from megatron_gkd.weights.chunks import unwrap


def student_logprobs(
    chunks: Sequence[torch.nn.Module],
    layout: Layout,
    groups: ProcessGroupCollection,
    sequences: Sequence[Sequence[int]],
    *,
    vocab_size: int,
    device: torch.device,
) -> list[list[float]]:
    """log Q(token | tokens before it) in nats for each token but the first of each sequence (of at least two tokens; a
    SeenSequence has pictures); the same on every rank.

    Communication: a forward pass per sequence over the student's layout (each rank computes its share),
    then one all-reduce of [number of tokens] float64 over all its ranks.
    """
    samples = [
        Sample(i, i, tuple(ids[:1]), tuple(ids[1:]), "dataset", pictures=getattr(ids, "pictures", ()))
        for i, ids in enumerate(sequences)
    ]
    plan = plan_forward([sample.num_inputs for sample in samples], layout, micro_batch_size=1)
    starts = [0]
    for sample in samples:
        starts.append(starts[-1] + len(sample.completion_ids))
    logprobs = torch.zeros(starts[-1], dtype=torch.float64, device=device)

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        return forward_hidden(model, batch, device), lambda hidden: measure(unwrap(model), hidden, batch)

    def measure(model: HiddenStateGPTModel, hidden: torch.Tensor, batch: MicroBatch) -> Any:
        rows = select_loss_tokens(model.head_input(hidden), batch)
        logits = torch.nn.functional.linear(rows, model.head_weight())
        values = -vocab_parallel_cross_entropy(
            logits, batch.labels.to(logits.device), tp_group=groups.tp, vocab_size=vocab_size
        ).double()
        shares = zip(batch.positions, batch.shares, strict=True)
        places = [starts[position] + token for position, share in shares for token in share.tokens]
        logprobs[torch.tensor(places, dtype=torch.int64, device=device)] = values
        return values.sum(), torch.tensor(len(places), dtype=torch.int, device=device), {}

    collate = Collator(samples, plan, layout, packing=False, cp_rank=groups.cp.rank())
    batches = [collate(positions) for positions in plan[groups.dp.rank()]]
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        run_schedule(chunks, layout, groups, forward_step, batches, forward_only=True)
    if groups.tp.rank() != 0:
        logprobs.zero_()  # every TP rank of the last stage computed the same
    dist.all_reduce(logprobs, group=groups.intra_dist_opt)
    return [logprobs[a:b].tolist() for a, b in pairwise(starts)]
