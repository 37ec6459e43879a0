"""What a real teacher's signals are when they arrive, against transformers in float64.

Not covered: NCCL, how signals travel (test_signals.py), teacher servers.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gkd.architecture import read_architecture
from megatron_gkd.data.collate import collate
from megatron_gkd.errors import ConfigError
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample, StepPlan
from megatron_gkd.schedule import plan_step
from megatron_gkd.teacher.signals import HiddenSignal
from megatron_gkd.teacher_pipeline import TeacherPipeline
from megatron_gkd.train.batches import Collator
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_jsd
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_vocab_shard
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.numerics import EPS, FLOOR, Float64, allowed_error, largest_error, transformers_model
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import groups_of, load_model, megatron

WORLD = 4
VOCAB = 300
TOPK = 5
CHUNK = 4  # tokens of a chunk of top-K logits: several per micro-batch


def step_samples() -> list[Sample]:
    """Mixed lengths; samples 2 and 5 have no completion, so nothing to teach."""
    generator = torch.Generator().manual_seed(2)
    sizes = [(4, 6), (1, 9), (5, 0), (7, 3), (2, 1), (3, 0), (6, 5), (9, 8)]
    ids = [torch.randint(0, VOCAB, (p + c,), generator=generator).tolist() for p, c in sizes]
    return [
        Sample(i, i, tuple(row[:p]), tuple(row[p:]), "dataset")
        for i, (row, (p, _)) in enumerate(zip(ids, sizes, strict=True))
    ]


class Dense(NamedTuple):
    """A teacher by transformers."""

    path: str
    logits: dict[int, torch.Tensor]  # by position: [C, VOCAB] of the loss tokens, float64
    of_logits: float  # how far fp32 may be from them
    of_logprobs: float  # and from their log-probabilities


def dense(path: Path) -> Dense:
    logits = {}
    for dtype, mode in ((torch.float64, Float64()), (torch.float32, nullcontext())):
        with mode, torch.no_grad():
            model = transformers_model(path, dtype)
            logits[dtype] = {
                s.position: model(torch.tensor([[*s.prompt_ids, *s.completion_ids]])[:, :-1]).logits[
                    0, s.num_inputs - s.num_loss_tokens :, :VOCAB
                ]
                for s in step_samples()
            }
    reference, truth = (torch.cat(list(logits[dtype].values())) for dtype in (torch.float32, torch.float64))
    of_logprobs = allowed_error(reference.log_softmax(-1), truth.log_softmax(-1))
    best = truth.topk(TOPK + 1).values
    assert (best[:, :-1] - best[:, 1:]).min() > 2 * of_logprobs, "rounding decides about the top K: take another seed"
    return Dense(str(path), logits[torch.float64], allowed_error(reference, truth), of_logprobs)


def plan_for(teacher: Layout, student: Layout, packing: bool) -> StepPlan:
    return plan_step(
        0,
        step_samples(),
        data_parallel_size=student.data,
        micro_batch_size=2,
        teacher_data_parallel_size=teacher.data,
        teacher_micro_batch_size=3,
        packing=packing,
        max_tokens=20 if packing else None,
    )


def make_teacher(path: str, layout: Layout, student: Layout, topk: int | None = None) -> TeacherPipeline:
    model = load_model(Path(path), layout)
    return TeacherPipeline(
        model.chunks,
        layout,
        model.groups,
        student,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        topk=topk,
        chunk_tokens=CHUNK,
    )


def head_shard(path: str, student: Layout, padded_vocab: int | None = None) -> torch.Tensor | None:
    """The teacher's head on the student's last stage, cut at the student's shard boundaries."""
    groups, arch = groups_of(student), read_architecture(path)
    if groups.pp.rank() != student.pipeline - 1:
        return None
    with HFCheckpoint(path) as checkpoint:
        return load_vocab_shard(
            checkpoint,
            arch,
            "head",
            rank=groups.tp.rank(),
            size=student.tensor,
            padded_vocab=padded_vocab or arch.padded_vocab_size(student.tensor),
            dtype=torch.float32,
            num_rows=VOCAB,
        )


class _Products(TorchDispatchMode):
    """Of every matrix product: the width of the result, and the most rows of that width."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            width = result.shape[-1]
            self.rows[width] = max(self.rows.get(width, 0), result.numel() // width)
        return result


def run_teacher(path: str, teacher: Layout, student: Layout, topk: int | None, packing: bool) -> dict[str, Any]:
    """Signals by sample as they arrive (hidden states already multiplied with this rank's shard of the head), and what
    the hooks saw."""
    with megatron():
        pipeline = make_teacher(path, teacher, student, topk)
        fed: Counter[tuple[int, ...]] = Counter()

        def count(module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
            fed.update(tuple(row) for row in args[0].tolist())

        for chunk in pipeline.chunks:
            chunk.register_forward_pre_hook(count, with_kwargs=True)
        before = [p.detach().clone() for chunk in pipeline.chunks for p in chunk.parameters()]
        plan = plan_for(teacher, student, packing)
        collator = Collator(plan.samples, plan.teacher, teacher, packing=packing, pad_id=VOCAB - 1)
        with _Products() as products:
            store, num_bytes = pipeline.signals(plan, collator)
        after = [p for chunk in pipeline.chunks for p in chunk.parameters()]
        head = head_shard(path, student) if topk is None else None
        arrived = {}
        graphless = not any(t.requires_grad for part in store._samples.values() for t in part)
        for position in list(store._samples):
            signal = store.gather(collate([plan.samples[position]]))
            if isinstance(signal, HiddenSignal):
                assert head is not None
                arrived[position] = (signal.hidden @ head.T,)
            else:
                arrived[position] = (signal.logprobs, signal.indices)
        return {
            "arrived": arrived,
            "fed": dict(fed),
            "bytes": num_bytes,
            "untouched": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "frozen": not any(p.requires_grad or p.grad is not None for p in after),
            "eval": not any(module.training for chunk in pipeline.chunks for module in chunk.modules()),
            "heads": [getattr(chunk, "output_layer", None) is not None for chunk in pipeline.chunks],
            "graphless": graphless,
            "logit_rows": products.rows.get(
                read_architecture(path).padded_vocab_size(teacher.tensor) // teacher.tensor, 0
            ),
        }


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dense]:
    root = tmp_path_factory.mktemp("teachers")
    found = {}
    for name, family, tied in (("untied", "llama", False), ("tied", "qwen3", True)):
        path = write_tiny_checkpoint(root / name, family, tied=tied, vocab_size=VOCAB, seed=4)  # type: ignore[arg-type]
        found[name] = dense(path)
    return found


# (teacher's layout, student's layout, packing)
CASES = {
    "PP4 to TP2-PP2": (Layout(pipeline=4), Layout(tensor=2, pipeline=2), False),
    "TP2-DP2 to PP2-DP2": (Layout(tensor=2, data=2), Layout(pipeline=2, data=2), False),
    "TP4 to DP4, packed": (Layout(tensor=4), Layout(data=4), True),
    "DP4 to TP4, packed": (Layout(data=4), Layout(tensor=4), True),
    "TP2-SP-PP2 to TP2-DP2": (Layout(tensor=2, pipeline=2, sequence_parallel=True), Layout(tensor=2, data=2), False),
}


def by_turns(first: int) -> pytest.MarkDecorator:
    """Each case with one of the two models, which is the other one for the other kind of signal; by night with both."""
    pairs = product(enumerate(CASES, start=first), enumerate(("untied", "tied")))
    cells = [(name, case) for (n, case), (m, name) in pairs if FULL or n % 2 == m]
    return pytest.mark.parametrize(("name", "case"), cells)


@by_turns(0)
def test_hidden_signal_times_the_teachers_head_is_transformers_logits(teachers: dict[str, Dense], name: str, case: str):
    expected, (teacher, student, packing) = teachers[name], CASES[case]
    ranks = run_ranks(run_teacher, expected.path, teacher, student, None, packing, world=WORLD)
    plan = plan_for(teacher, student, packing)
    check_common(ranks, plan, teacher, student, packing)
    for dp in range(student.data):
        parts = [ranks[rank]["arrived"] for rank in student.last_stage_ranks(dp)]
        for position in (p for batch in plan.student[dp] for p in batch):
            logits = torch.cat([part[position][0] for part in parts], dim=1)
            assert logits.shape[0] == plan.samples[position].num_loss_tokens
            assert not logits[:, VOCAB:].any(), "padding rows of the head are zero"
            assert largest_error(logits[:, :VOCAB], expected.logits[position]) <= expected.of_logits
    assert not any(head for result in ranks for head in result["heads"]), "the student's last stage holds the shards"
    assert not any(result["logit_rows"] for result in ranks), "logits were computed"


@by_turns(1)
def test_topk_signal_is_the_dense_models_topk_with_the_full_logsumexp(teachers: dict[str, Dense], name: str, case: str):
    expected, (teacher, student, packing) = teachers[name], CASES[case]
    ranks = run_ranks(run_teacher, expected.path, teacher, student, TOPK, packing, world=WORLD)
    plan = plan_for(teacher, student, packing)
    check_common(ranks, plan, teacher, student, packing)
    assert max(result["logit_rows"] for result in ranks) == CHUNK, "logits are held for one chunk of tokens at a time"
    for dp in range(student.data):
        for rank in student.last_stage_ranks(dp):
            for position in (p for batch in plan.student[dp] for p in batch):
                logprobs, indices = ranks[rank]["arrived"][position]
                values, ids = torch.log_softmax(expected.logits[position], dim=-1).topk(TOPK)
                assert torch.equal(indices, ids)
                assert largest_error(logprobs, values) <= expected.of_logprobs


def check_common(ranks: list[dict[str, Any]], plan: StepPlan, teacher: Layout, student: Layout, packing: bool) -> None:
    """Every sequence forwarded once; frozen and untouched; arrivals and bytes as planned."""
    trained = {p: dp for dp, batches in enumerate(plan.student) for batch in batches for p in batch}
    for rank, result in enumerate(ranks):
        where = student.coordinate(rank)
        mine = {p for p, dp in trained.items() if dp == where.dp} if where.pp == student.pipeline - 1 else set()
        assert result["arrived"].keys() == mine
        for key in ("untouched", "frozen", "eval", "graphless"):
            assert result[key], key
    expected_inputs = Counter((*s.prompt_ids, *s.completion_ids)[:-1] for s in plan.samples)
    for tp, pp in product(range(teacher.tensor), range(teacher.pipeline)):
        fed: Counter[tuple[int, ...]] = Counter()
        for dp in range(teacher.data):
            rank = next(
                r for r in range(WORLD) if tuple(teacher.coordinate(r)) == (tp, 0, dp, pp)
            )  # the replicas share the samples, the ranks of one replica all see them
            fed.update(ranks[rank]["fed"])
        assert sequences(fed, expected_inputs, packing) == expected_inputs


def sequences(
    fed: Counter[tuple[int, ...]], expected: Counter[tuple[int, ...]], packing: bool
) -> Counter[tuple[int, ...]]:
    """The samples in the rows that the model was fed: a row is a sample and padding, or samples end to end."""
    found: Counter[tuple[int, ...]] = Counter()
    for row, times in fed.items():
        rest = row
        while True:
            starts = [s for s in expected if rest[: len(s)] == s]
            if not starts:
                break
            longest = max(starts, key=len)
            found[longest] += times
            rest = rest[len(longest) :]
            if not packing:
                break
        assert set(rest) <= {VOCAB - 1}, "what is left of a row must be padding"
    return found


# ---- another padding of the vocabulary -------------------------------------------------------------------------------


def divergence_of_identical_models(student: str, teacher: str, layout: Layout) -> list[float]:
    """Largest generalised JSD of any loss token between the two checkpoints, for three betas; each distribution comes
    through a pipeline of its own, with its own head."""
    with megatron():
        results = []
        signals = []
        for path in (student, teacher):
            pipeline = make_teacher(path, layout, layout)
            plan = plan_for(layout, layout, packing=False)
            signals.append(pipeline.signals(plan, Collator(plan.samples, plan.teacher, layout, packing=False))[0])
        groups = groups_of(layout)
        if not signals[0]._samples:
            return []
        rows = read_architecture(student).padded_vocab_size(layout.tensor)
        heads = [head_shard(path, layout, rows) for path in (student, teacher)]
        assert heads[0] is not None
        assert heads[1] is not None
        assert heads[0].shape == heads[1].shape
        logits = [
            torch.cat([store._samples[p][0] for p in sorted(store._samples)]) @ head.T
            for store, head in zip(signals, heads, strict=True)
        ]
        for beta in (0.0, 0.5, 1.0):
            values = vocab_parallel_jsd(logits[0], logits[1], beta=beta, tp_group=groups.tp, vocab_size=VOCAB)
            results.append(values.abs().max().item())
        return results


def with_more_rows(source: str, out: Path, rows: int) -> str:
    """The same model with a vocabulary of `rows`: what is above VOCAB has weights that would win if they were used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[VOCAB:] = weight[:VOCAB].abs().max() * 10
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return str(out)


PADDINGS = [Layout(tensor=4), Layout(tensor=2, pipeline=2), Layout(data=4)]


@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, layout) for i, layout in enumerate(PADDINGS) for n in ("untied", "tied") if FULL or (n == "tied") == (i == 1)],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_pitfalls_3_and_4_identical_models_of_other_padding_do_not_diverge(
    teachers: dict[str, Dense], tmp_path: Path, name: str, layout: Layout
):
    """300 rows against 384, which Megatron pads to 512 and 1024 rows or so, by TP: aligned by global token id."""
    path = teachers[name].path
    wider = with_more_rows(path, tmp_path / "wider", 384)
    for student, teacher in ((path, wider), (wider, path)):
        ranks = run_ranks(divergence_of_identical_models, student, teacher, layout, world=WORLD)
        found = [value for rank in ranks for value in rank]
        assert len(found) == 3 * layout.tensor * layout.data
        assert max(found) <= FLOOR * EPS * math.log(VOCAB), "log-probabilities of this size, rounded twice"


def topk_of(path: str, layout: Layout) -> dict[int, tuple[torch.Tensor, ...]]:
    with megatron():
        pipeline = make_teacher(path, layout, layout, TOPK)
        plan = plan_for(layout, layout, packing=False)
        return pipeline.signals(plan, Collator(plan.samples, plan.teacher, layout, packing=False))[0]._samples


def test_pitfall_4_rows_above_the_vocabulary_are_never_in_the_topk(teachers: dict[str, Dense], tmp_path: Path):
    expected = teachers["untied"]
    wider = with_more_rows(expected.path, tmp_path / "wider", 384)
    layout = Layout(tensor=4)
    for samples in run_ranks(topk_of, wider, layout, world=WORLD):
        for position, (logprobs, indices) in samples.items():
            values, ids = torch.log_softmax(expected.logits[position], dim=-1).topk(TOPK)
            assert torch.equal(indices.long(), ids)
            assert largest_error(logprobs, values) <= expected.of_logprobs


# ---- refusals --------------------------------------------------------------------------------------------------------


def wrong_topk(path: str) -> list[str]:
    messages = []
    with megatron():
        for topk in (0, VOCAB + 1):
            try:
                make_teacher(path, Layout(), Layout(), topk)
            except ConfigError as error:
                messages.append(str(error))
    return messages


def test_topk_outside_the_vocabulary_is_refused(teachers: Any):
    (messages,) = run_ranks(wrong_topk, teachers["untied"][0], world=1)
    assert messages == [f"gkd_logits_topk is {k}; give 1 to 300, the size of the vocabulary" for k in (0, 301)]
