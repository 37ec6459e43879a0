"""One training step equals a plain transformers + torch implementation of the same step, in every layout.

Loss, gradient norm, reported means and every updated weight (by its HF name), as near to float64 as the plain step in
float32 is, of a tiny Qwen3 (tied embeddings) and a tiny Llama (untied), against dense_step.py. In each layout the grid

    beta 0, 0.5, 1  x  full vocabulary, top K renormalised, top K with a tail  x  sft_alpha 0, 0.5

with micro-batches of 1 and 4 samples and both loss paths alternating over it, then a few cells more: the other
micro-batch size and path, packing, a loss temperature. Each model takes in each layout every beta, every signal and
both alphas once, in pairs that change from layout to layout (a Latin square), and half of the cells more;
GKD_TEST_FULL=1 runs all with both. The batch has mixed lengths, an empty completion,
samples of all three sources. Student and teacher differ in hidden size, depth, padded vocabulary and, mostly, in
layout.

Not covered: bf16, more than one step (test_checkpoint.py, test_golden.py), CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_gkd.config.run import DistillationConfig, TrainingConfig
from megatron_gkd.data import cut
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.model import sequences
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.records import SOURCES
from megatron_gkd.train import setup
from megatron_gkd.train.objective import DistillationLoss
from tests.support.dense_step import DenseStep, Fault, Objective, dense_step, differences
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import PAIRS, StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

TOPK = 12
SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])

# adam_eps near the gradient's own size: the update keeps its direction AND its scale, where 1e-8 would leave the sign
# alone. The gradient norm is above clip_grad, and one step changes the weights by several percent.
OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)


@dataclass(frozen=True)
class Cell:
    """One step of a layout."""

    objective: Objective
    micro_batch_size: int
    loss_path: str
    packing: bool = False
    teacher_micro_batch_size: int | None = None
    max_tokens: int = 24  # of a pack
    num_samples: int = len(SAMPLES)

    def distillation(self) -> DistillationConfig:
        objective = self.objective
        return DistillationConfig(
            beta=objective.beta,
            sft_alpha=objective.sft_alpha,
            loss_temperature=objective.temperature,
            gkd_logits_topk=None if objective.signal == "full" else TOPK,
            topk_tail="bucket" if objective.signal == "bucket" else "renormalize",
            loss_path=self.loss_path,  # type: ignore[arg-type]
        )


OBJECTIVES = [
    Objective(beta, signal, sft_alpha)  # type: ignore[arg-type]
    for beta, signal, sft_alpha in product((0.0, 0.5, 1.0), ("full", "topk", "bucket"), (0.0, 0.5))
]


def cells(offset: int) -> list[Cell]:
    """The grid of the module docstring; `offset` shifts the alternation, so that the layouts complement one another."""
    grid = [
        Cell(objective, (1, 4)[(index + offset) % 2], ("fused", "logits")[(index // 2 + index // 6 + offset // 2) % 2])
        for index, objective in enumerate(OBJECTIVES)
    ]
    middle, warm = Objective(0.5, "full", 0.5), Objective(1.0, "topk", 0.5, temperature=1.7)
    more = [Cell(middle, size, path) for size, path in product((1, 4), ("fused", "logits"))]
    more += [Cell(warm, 2, "fused", teacher_micro_batch_size=3), Cell(warm, 2, "logits")]
    more += [Cell(replace(warm, signal="full"), 1, path) for path in ("fused", "logits")]
    return list(dict.fromkeys(grid + more))


def of_family(cells: list[Cell], family: str, layout: int) -> list[Cell]:
    """Those that a family takes in a layout: of the grid a Latin square of beta and signal, each with one alpha, which
    is another one for the other family and the next layout; of the rest half, the other family has the other half."""
    own = list(PAIRS).index(family)
    taken = [
        (beta + signal + layout + own) % 3 == 0 and alpha == (beta + layout + own) % 2
        for beta, signal, alpha in product(range(3), range(3), range(2))  # of OBJECTIVES
    ]
    taken += [rest % 2 == own for rest in range(len(cells) - len(taken))]
    return [cell for cell, own_cell in zip(cells, taken, strict=True) if FULL or own_cell]


PACKED = [
    Cell(Objective(0.5, "full", 0.5), 1, "fused", packing=True),
    Cell(Objective(1.0, "bucket", 0.0), 1, "logits", packing=True),
]
# The interleaved schedule goes through its micro-batches in groups. PACKED are three micro-batches; here are two, one,
# five and one.
FOR_GROUPS = [
    *(Cell(Objective(0.5, "full", 0.5), 1, "fused", packing=True, max_tokens=tokens) for tokens in (40, 80)),
    Cell(Objective(0.5, "full", 0.5), 1, "fused", num_samples=5),
    Cell(Objective(1.0, "bucket", 0.0), 8, "logits"),
]
# Context parallelism changes who holds which tokens, and attention; not what is made of a token.
OF_CONTEXT = [
    Cell(Objective(0.0, "bucket", 0.5), 4, "fused"),
    Cell(Objective(0.5, "full", 0.5), 1, "logits"),
    *PACKED,
]

# name -> (ranks, layout of student and teacher). The optimizer is sharded (or not) where it makes a difference.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, dict(sharded=False)),
    "TP2": (2, dict(tensor=2, teacher_tensor=1, teacher_pipeline=2)),
    "PP2": (2, dict(pipeline=2, teacher_tensor=2, teacher_pipeline=1)),
    "DP2": (2, dict(sharded=True, teacher_tensor=2)),
    "DP2, whole optimizer": (2, dict(sharded=False)),
    "TP2 SP": (2, dict(tensor=2, sequence=True, teacher_tensor=1)),
    "PP2 VPP2": (2, dict(pipeline=2, virtual=2, teacher_pipeline=2)),
    "TP2 PP2": (4, dict(tensor=2, pipeline=2, teacher_tensor=2, teacher_pipeline=1)),
    "CP2": (2, dict(context=2)),
    "CP2, teacher TP2 CP1": (2, dict(context=2, teacher_tensor=2, teacher_context=1, sharded=False)),
    "CP1, teacher CP2": (2, dict(teacher_context=2)),
    "TP2 SP CP2": (4, dict(tensor=2, sequence=True, context=2, teacher_tensor=1, teacher_context=4)),
    "CP2 PP2": (4, dict(context=2, pipeline=2, teacher_pipeline=1, teacher_context=2)),
}
if FULL:
    LAYOUTS |= {
        "TP2 CP2": (4, dict(tensor=2, context=2)),
        "CP4": (4, dict(context=4)),
        "CP2 DP2": (4, dict(context=2, teacher_context=1)),
        "CP2 PP2 VPP2": (4, dict(context=2, pipeline=2, virtual=2)),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


def config_of(root: Path, family: str, layout: dict[str, Any]) -> Any:
    student, teacher = write_pair(root, family)
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8)
    flags = {T[name]: value for name, value in layout.items()}
    return run_config(
        student,
        teacher,
        dataset,
        micro_batch_size=1,
        global_batch_size=len(SAMPLES),
        train_iters=1,
        lr_decay_style="constant",
        lr_warmup_fraction=0.0,
        **OPTIMIZER,
        **flags,
    )


def run_cells(config: Any, cells: list[Cell]) -> list[StepOutcome]:
    """One step per cell, each from the same state."""
    outcomes = []
    with megatron():
        trainer = Trainer(config)
        for cell in cells:
            trainer.rewind()
            outcomes.append(
                trainer.step(
                    SAMPLES[: cell.num_samples],
                    cell.distillation(),
                    micro_batch_size=cell.micro_batch_size,
                    teacher_micro_batch_size=cell.teacher_micro_batch_size,
                    packing=cell.packing,
                    max_tokens=cell.max_tokens if cell.packing else None,
                )
            )
    return outcomes


@cache
def truth(
    student: str, teacher: str, objective: Objective, fault: Fault | None = None, num_samples: int = len(SAMPLES)
) -> DenseStep:
    training, samples = TrainingConfig(**OPTIMIZER), SAMPLES[:num_samples]
    return dense_step(student, teacher, samples, objective, training, topk=TOPK, fault=fault)


def counts(num_samples: int) -> dict[str, int]:
    """Loss tokens, and samples by source."""
    samples = SAMPLES[:num_samples]
    of_sources = {source: sum(sample.source == source for sample in samples) for source in SOURCES}
    return {"tokens": sum(sample.num_loss_tokens for sample in samples), **of_sources}


# The gate has both families, of which one shares its embedding between the two ends of a pipeline, in one process and
# in a pipeline; of the other layouts one family.
CASES = [
    (family, layout)
    for family in PAIRS
    for layout in LAYOUTS
    if FULL or layout in ("TP1", "PP2") or family == ("llama" if "CP" in layout else "qwen3")
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_step_equals_the_dense_step(root: Path, family: str, layout: str) -> None:
    world, options = LAYOUTS[layout]
    config = config_of(root, family, options)
    number = list(LAYOUTS).index(layout)
    grid = cells(number) + PACKED
    if "virtual" in options:
        grid += FOR_GROUPS
    grid = of_family(grid, family, number)
    if "CP" in layout and not FULL:
        grid = OF_CONTEXT
    results = run_ranks(run_cells, config, grid, world=world)
    student, teacher = config.model.model, config.teacher.teacher_model
    faults = {}
    for index, cell in enumerate(grid):
        expected = truth(student, teacher, cell.objective, num_samples=cell.num_samples)
        assert expected.grad_norm > OPTIMIZER["clip_grad"]
        outcomes = [outcome[index] for outcome in results]
        assert len({(outcome.loss, outcome.grad_norm) for outcome in outcomes}) == 1, "ranks report different numbers"
        (written,) = [outcome for outcome in outcomes if outcome.weights is not None]
        assert written.weights is not None
        assert all(outcome.counts == counts(cell.num_samples) for outcome in outcomes)
        wrong = differences(written.loss, written.grad_norm, written.metrics, written.weights, expected)
        if wrong:
            faults[cell] = wrong
    assert not faults, "\n".join(f"{cell}\n    {wrong}" for cell, wrong in faults.items())


# ---- the comparison itself ------------------------------------------------------------------------------------------

CONTROL = Objective(0.0, "full", 0.5)
WRONG_STEPS: dict[str, tuple[Objective, Fault | None, set[str]]] = {
    # what is done wrongly -> (objective, fault, what must tell it)
    "mean per sample, then over samples": (CONTROL, "mean_per_sample", {"loss", "grad_norm"}),
    "the sum, not divided": (CONTROL, "no_division", {"loss", "grad_norm"}),
    "cross entropy on the student's samples": (CONTROL, "sft_on_student", {"loss", "metric cross_entropy"}),
    "labels one position off": (CONTROL, "label_shift", {"loss", "metric divergence"}),
    "weight decay on norms": (CONTROL, "decay_on_norms", {"model.norm.weight"}),
    "no clipping": (CONTROL, "no_clipping", {"model.norm.weight"}),
    "beta swapped": (replace(CONTROL, beta=1.0), None, {"loss", "grad_norm", "metric divergence"}),
    "top K for full": (replace(CONTROL, signal="topk"), None, {"loss", "grad_norm", "metric divergence"}),
    "tail for none": (replace(CONTROL, signal="bucket"), None, {"loss", "grad_norm", "metric divergence"}),
    "alpha 1e-4 off": (replace(CONTROL, sft_alpha=0.50005), None, {"loss", "grad_norm"}),
}


def counts_samples_whole(patch: pytest.MonkeyPatch) -> None:
    """The number of loss tokens CP times too large: each rank says those of whole samples."""
    original = DistillationLoss.__call__

    def call(self: DistillationLoss, model: Any, hidden: Any, batch: MicroBatch, signal: Any) -> Any:
        loss_sum, _, report = original(self, model, hidden, batch, signal)
        whole = sum(SAMPLES[position].num_loss_tokens for position in batch.positions)
        return loss_sum, torch.tensor(whole, dtype=torch.int), report

    patch.setattr(DistillationLoss, "__call__", call)


def cuts_contiguous_chunks(patch: pytest.MonkeyPatch) -> None:
    """Tokens, labels and shares without the zigzag that attention and rotary positions have."""

    def spans(length: int, size: int, rank: int) -> list[tuple[int, int]]:
        return [(length // size * rank, length // size * (rank + 1))]

    def of_pack(lengths: list[int], size: int, rank: int) -> list[tuple[int, int]]:
        borders = pairwise(accumulate(lengths, initial=0))
        return [(a + first, a + end) for a, b in borders for first, end in spans(b - a, size, rank)]

    patch.setattr(cut, "held_spans_of_pack", of_pack)
    patch.setattr(sequences, "held_spans", spans)


def drops_the_sum_of_the_backward(patch: pytest.MonkeyPatch) -> None:
    """Each rank keeps the gradient of its own keys and values from its own queries."""
    patch.setattr(dist, "reduce_scatter_tensor", lambda out, x, group: out.copy_(x.chunk(2)[group.rank()]))


def sums_over_replicas_alone(patch: pytest.MonkeyPatch) -> None:
    """Gradients and the number of tokens over `dp`, as without context parallelism."""

    def groups_of(layout: Any) -> Any:
        groups = build_groups(layout)
        groups.dp_cp = groups.intra_dp_cp = groups.dp
        return groups

    patch.setattr(setup, "build_groups", groups_of)


KEYS = "model.layers.0.self_attn.k_proj.weight"
FAULTS_OF_CONTEXT = {
    counts_samples_whole: {"grad_norm"},  # a scale of the whole gradient is clipped away before the update
    cuts_contiguous_chunks: {"loss", "grad_norm", KEYS},
    drops_the_sum_of_the_backward: {"grad_norm", KEYS},
    sums_over_replicas_alone: {"grad_norm", KEYS},
}


def run_with_faults(config: Any) -> list[StepOutcome]:
    """One step with each of them, and one without."""
    outcomes = []
    for fault in (*FAULTS_OF_CONTEXT, None):
        with pytest.MonkeyPatch.context() as patch:
            if fault is not None:
                fault(patch)
            outcomes += run_cells(config, [Cell(CONTROL, 4, "fused")])
    return outcomes


def test_faults_of_context_parallelism_are_told_apart(root: Path) -> None:
    config = config_of(root, "llama", dict(context=2, sharded=False))
    student, teacher = config.model.model, config.teacher.teacher_model
    outcomes, _ = run_ranks(run_with_faults, config, world=2)
    for fault, outcome in zip((*FAULTS_OF_CONTEXT, None), outcomes, strict=True):
        assert outcome.weights is not None
        dense = truth(student, teacher, CONTROL)
        found = differences(outcome.loss, outcome.grad_norm, outcome.metrics, outcome.weights, dense)
        if fault is None:
            assert not found
        else:
            assert FAULTS_OF_CONTEXT[fault] <= found.keys(), fault.__name__


@pytest.fixture(scope="module")
def control(root: Path) -> tuple[Any, StepOutcome]:
    config = config_of(root, "llama", {})
    (outcomes,) = run_ranks(run_cells, config, [Cell(CONTROL, 2, "fused")], world=1)
    return config, outcomes[0]


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_wrong_dense_step_is_told_apart(control: tuple[Any, StepOutcome], wrong: str) -> None:
    config, outcome = control
    objective, fault, telling = WRONG_STEPS[wrong]
    student, teacher = config.model.model, config.teacher.teacher_model

    def compare(dense: DenseStep) -> dict[str, float]:
        assert outcome.weights is not None
        return differences(outcome.loss, outcome.grad_norm, outcome.metrics, outcome.weights, dense)

    assert not compare(truth(student, teacher, CONTROL))
    assert telling <= compare(truth(student, teacher, objective, fault)).keys()
