"""`megatron-gkd check teacher`: compares a teacher server with the same model run locally, on real rows.

The server is asked as training asks it (ServerTeacher), the local teacher computes as training computes
(TeacherPipeline, full vocabulary), for the same sequences. Compared per completion token:

    log-probabilities   |server - local| of the K tokens that the server names
    top-K loss          |D(server's top K, student) - D(local top K, student)|, with --beta, for one student: the local
                        teacher at temperature 2. That is far enough from the teacher for the difference to be of first
                        order in the teacher's error, and needs no second model.

Above the tolerances the command ends with exit code 1. A wrong prompt, offset or tokenizer gives differences of several
nats. Rounding gives about 1e-5 for fp32 against fp32, and up to some tenths at single, improbable tokens for bf16
against bf16.

One process. Memory: the model, and [T, V] of one row at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_gkd import platform
from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.checks import CheckConfig
from megatron_gkd.config.dtypes import chosen
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.rows import RowDataset, load_rows
from megatron_gkd.errors import CheckFailedError, DataError
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample, StepPlan
from megatron_gkd.teacher.served import ServerTeacher
from megatron_gkd.teacher.servers.probes import ServerRequirements, probe_tokens
from megatron_gkd.teacher.signals import HiddenSignal, TopKSignal
from megatron_gkd.teacher_pipeline import TeacherPipeline
from megatron_gkd.topk_jsd import topk_jsd
from megatron_gkd.train.batches import Collator
from megatron_gkd.train.hub_files import with_local_files
from megatron_gkd.weights.source import ModelSource

logger = get_logger(__name__)

_STUDENT_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Comparison:
    """The comparison over all tokens of all rows."""

    num_rows: int
    num_tokens: int
    logprob_max: float
    logprob_mean: float
    loss_max: float
    loss_mean_server: float
    loss_mean_local: float
    other_tokens: float  # share of the server's top K that the local top K lacks; ties are among them

    def lines(self) -> list[str]:
        """The comparison as lines of text."""
        return [
            f"rows                              {self.num_rows}",
            f"completion tokens                 {self.num_tokens}",
            f"log-probabilities, largest diff.  {self.logprob_max:.3g}",
            f"log-probabilities, mean diff.     {self.logprob_mean:.3g}",
            f"top-K loss, largest diff.         {self.loss_max:.3g}",
            f"top-K loss, mean of the server    {self.loss_mean_server:.6g}",
            f"top-K loss, mean here             {self.loss_mean_local:.6g}",
            f"top-K tokens that differ          {self.other_tokens:.3%}",
        ]


def run_check_teacher(config: CheckConfig) -> None:
    """Print the comparison; raises CheckFailedError above a tolerance."""
    kind = platform.setup(config.device).kind
    if config.dtype == "auto":
        config = replace(config, dtype=chosen(config.dtype, kind))
        logger.info("--dtype is not given: %s, on %s", config.dtype, kind)
    config = with_local_files(config)
    found = compare(config)
    print("\n".join(found.lines()), flush=True)
    for what, value, limit in zip(
        ("log-probabilities", "top-K loss"), (found.logprob_max, found.loss_max), config.tolerances, strict=True
    ):
        if not value <= limit:
            raise CheckFailedError(
                f"{config.teacher_model_server} is not the teacher of {config.teacher_model}: the largest difference "
                f"of the {what} is {value:.3g}, and {limit:g} is allowed; look for another model, dtype or logprobs "
                "mode on the server"
            )


def compare(config: CheckConfig) -> Comparison:
    """Compare both teachers on the rows."""
    where = platform.setup(config.device)
    platform.init_distributed(where)
    arch = read_architecture(config.teacher_model)
    tokenizer = load_tokenizer(config.teacher_model)
    rows = load_rows(config.dataset, tokenizer, max_length=config.max_length, max_rows=config.num_rows)
    rows.require_completions("check teacher")
    samples = _samples(rows)
    alone = (tuple((sample.position,) for sample in samples),)
    plan = StepPlan(0, samples, alone, alone)
    sequences = [(*s.prompt_ids, *s.completion_ids) for s in samples]  # the teacher's prompts
    needs = ServerRequirements(
        config.gkd_logits_topk,
        arch.vocab_size,
        len(tokenizer) - 1,
        max(map(len, sequences)),
        probe_tokens(sequences, len(tokenizer) - 1),
        functools.partial(tokenizer.encode, add_special_tokens=False),
    )
    layout = Layout()
    groups = build_groups(layout)
    collate = Collator(samples, plan.teacher, layout, packing=False)
    server = ServerTeacher(config.servers, needs, layout, device=where.device, timeout_s=config.timeout_s)
    try:
        remote, _ = server.signals(plan, collate)
    finally:
        server.close()
    source = ModelSource(config.teacher_model, arch)
    chunks = source.build(layout, groups, ModelOptions.on(where.kind), dtype=config.precision)
    source.load(chunks, groups)
    head = chunks[-1].head_weight().detach()[: arch.vocab_size]
    teacher = TeacherPipeline(chunks, layout, groups, layout, vocab_size=arch.vocab_size, device=where.device)
    local, _ = teacher.signals(plan, collate)
    parts = []
    for sample in samples:
        batch = collate([sample.position])
        here, there = local.gather(batch), remote.gather(batch)
        assert isinstance(here, HiddenSignal)
        assert isinstance(there, TopKSignal)
        logits = torch.nn.functional.linear(here.hidden, head).float()
        parts.append(compare_row(logits, there, beta=config.beta, tp_group=groups.tp))
    return _summary(parts, num_rows=len(samples))


@dataclass(frozen=True)
class RowComparison:
    """One row: differences [T, K], losses [T], and which of the server's tokens are not in the local top K [T, K]."""

    logprob: torch.Tensor
    loss_server: torch.Tensor
    loss_local: torch.Tensor
    other: torch.Tensor


@torch.no_grad()
def compare_row(
    logits: torch.Tensor, signal: TopKSignal, *, beta: float, tp_group: torch.distributed.ProcessGroup
) -> RowComparison:
    """`logits` [T, V] are the local teacher's, `signal` is the server's top K."""
    logprobs, ids = signal.logprobs, signal.indices
    of_local = logits.log_softmax(-1)
    best, best_ids = of_local.topk(ids.shape[1])
    difference = (of_local.gather(1, ids) - logprobs).abs()
    difference[of_local.gather(1, ids) == logprobs] = 0.0  # also where both are -inf
    student = logits / _STUDENT_TEMPERATURE
    of_server = topk_jsd(student, logprobs, ids, beta=beta, tp_group=tp_group)
    of_teacher = topk_jsd(student, best, best_ids, beta=beta, tp_group=tp_group)
    return RowComparison(difference, of_server, of_teacher, ~(ids[:, :, None] == best_ids[:, None, :]).any(-1))


def _summary(parts: Sequence[RowComparison], *, num_rows: int) -> Comparison:
    logprob, server, local, other = (
        torch.cat([getattr(part, name).double() for part in parts])
        for name in ("logprob", "loss_server", "loss_local", "other")
    )
    if not server.numel():
        raise DataError("the rows have no completion tokens, so there is nothing to compare; give others")
    return Comparison(
        num_rows,
        server.numel(),
        logprob.max().item(),
        logprob.mean().item(),
        (server - local).abs().max().item(),
        server.mean().item(),
        local.mean().item(),
        other.mean().item(),
    )


def _samples(rows: RowDataset) -> tuple[Sample, ...]:
    samples = []
    for index in range(len(rows)):
        row = rows[index]
        assert row.completion_ids is not None, "require_completions has seen to it"
        samples.append(Sample(index, index, row.prompt_ids_for_teacher, row.completion_ids, "dataset"))
    return tuple(samples)
