"""Bytes of a rank in closed form: a function of configuration, layout and lengths, beside the rehearsal, which carries
a step out (rehearsal.py). No tensors, no ranks: milliseconds for any model. Where the two differ, this one is wrong.

    formula(config, (student, teacher), (layout, teacher's), rank, (prompt, completion))  -> {phase: {category: bytes}}

Phases and categories are those of a rehearsal (phases.py), w bytes of a number, K the teacher's top, V vocabulary:

    between steps  the student's weights, gradients, optimizer (parameters.py); the teacher's weights w N_t, and on the
                   student's last stage its head, w V/tp H_t
    teacher        what a layer needs that keeps nothing; signals of all that its replica forwards, w H_t or 8 K a token
    forward        activations of the micro-batches in flight (activations.py); on the last stage the final norm and the
                   loss. Of a chunk of C tokens, v columns: C v (w + w + 8 (w < 4) + 8 + temporaries); the head's
                   gradient 4 V/tp H; of T tokens hidden states and their gradient, 2 w T H. Signals of its completions
    backward       the largest of: its beginning, with the head's gradient twice; a group of layers that is recomputed;
                   on the first stage the embedding's gradient w V/tp H, when the layers of its own micro-batch are gone
                   and those of the others in flight are there: every backward pass of the first chunk makes it anew
    step 1         two fp32 temporaries of the largest tensor that is updated

`not_covered` says of which runs there is no formula.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, ServerTeachers
from megatron_gkd.parallel.layout import Layout, round_up
from megatron_gkd.parallel.zigzag import held_spans
from megatron_gkd.schedule import plan_micro_batches
from megatron_gkd.train.activations import Fed, held
from megatron_gkd.train.fit import max_tokens, teacher_max_tokens
from megatron_gkd.train.parameters import BYTES, parameters, stage_layers, state_bytes, update_bytes
from megatron_gkd.train.phases import HEAD, WEIGHTS, away

Phases = dict[str, dict[str, float]]
_CHUNK_BYTES, _CHUNK_TOKENS = 2**30, 2048  # loss/fused/task.py, on a GPU
_TOPK_TOKENS = 1024  # whose logits the teacher holds at once (teacher_pipeline.py)


def not_covered(config: RunConfig, archs: tuple[Architecture, Architecture | None]) -> str | None:
    """Why there is no formula for this run; None: there is."""
    if config.tuner.is_lora:
        return "adapters"
    if any(arch is not None and arch.vision is not None for arch in archs):
        return "a vision tower"
    if any(arch is not None and arch.latent is not None for arch in archs):
        return "latent attention"
    if set(config.recompute.recompute_modules) - {"core_attn"}:
        return "--recompute_modules other than core_attn"
    if config.recompute.recompute_method == "block":
        return "--recompute_method block"
    if not config.distillation.fuse_loss:
        return "--loss_path logits"
    return None


def formula(
    config: RunConfig,
    archs: tuple[Architecture, Architecture | None],
    layouts: tuple[Layout, Layout],
    rank: int,
    lengths: tuple[int, int],
) -> Phases:
    """See the module docstring. Args: lengths: (prompt, completion) tokens of every sample."""
    (arch, of_teacher), (student, teacher) = archs, layouts
    width, local = BYTES[config.model.precision], isinstance(config.teacher.kind, LocalTeacher)
    samples, there, phases = config.training.global_batch_size, dict[str, float](), Phases()
    stage = student.coordinate(rank).pp if student.holds(rank) else None
    if stage is not None:
        there |= state_bytes(config, arch, student, stage)
    if local and of_teacher is not None:
        if teacher.holds(rank):
            dense, experts = parameters(
                of_teacher, teacher, teacher.coordinate(rank).pp, head=config.distillation.gkd_logits_topk is not None
            )
            there[WEIGHTS] = width * (dense + experts)
        if stage == student.pipeline - 1 and config.distillation.gkd_logits_topk is None:
            columns = arch.padded_vocab_size(student.tensor) // student.tensor
            there[HEAD] = width * columns * of_teacher.hidden_size
    phases["load"] = dict(there)
    teaches = of_teacher if local else None if isinstance(config.teacher.kind, NoTeacher | ServerTeachers) else arch
    signal = _signal_bytes(config, teaches, width)
    where = teacher if local else student
    passing = 0.0
    if where.holds(rank) and where.coordinate(rank).pp == where.pipeline - 1:
        passing += signal * _loss_tokens(config, where, rank, lengths) * samples / where.data
    if teaches is not None and where.holds(rank):
        passing += _passing(config, teaches, where, student, lengths)
    phases["teacher"] = there | {"teacher: activations, signals": passing}
    if stage is None:
        return _without_host(config, phases)
    last = stage == student.pipeline - 1
    tokens = _loss_tokens(config, student, rank, lengths)
    micro_batches = _micro_batches(config, student, lengths)
    # Those of the micro-batch that is under way are put together with its activations.
    under_way, of_all = signal * tokens * micro_batches[0], signal * tokens * samples / student.data
    if config.teacher.teacher_placement == "separate":
        of_all = min(of_all, under_way + config.teacher.signal_memory_gb * 1e9)
    signals = {"signals": of_all - under_way} if last and signal else {}
    fed = Fed(arch, student, width, micro_batches[0], _fed_length(config, student, lengths), config.data.packing)
    kept = _kept(config, fed, stage, len(micro_batches))
    layers = [layer for chunk in stage_layers(arch, student, stage) for layer in chunk]
    left = sum(fed.left(layer, config.recompute.recompute_granularity) for layer in layers)
    forward, backward = _moments(
        config, fed, stage, kept, left, tokens * fed.rows, teaches, student.coordinate(rank).tp
    )
    forward["student: activations"] += under_way * last
    phases["forward"], phases["backward"] = there | signals | forward, there | signals | backward
    left += fed.whole if student.sequence_parallel else 0.0
    at = student.coordinate(rank)
    update = update_bytes(config, arch, student, stage, at.cp + student.context * at.dp)
    phases["step 1"] = there | {"update": update, "student: activations": left}
    return _without_host(config, phases)


def _without_host(config: RunConfig, phases: Phases) -> Phases:
    """Without what is in host memory then, and what is nothing."""
    gone = {name: set(away(config, name)) for name in phases}
    return {
        name: {category: number for category, number in parts.items() if number and category not in gone[name]}
        for name, parts in phases.items()
    }


def _signal_bytes(config: RunConfig, teaches: Architecture | None, width: int) -> float:
    """Of a completion token."""
    if (topk := config.distillation.gkd_logits_topk) is not None:
        return 8 * topk
    return 0 if teaches is None else width * teaches.hidden_size


def _loss_tokens(config: RunConfig, layout: Layout, rank: int, lengths: tuple[int, int]) -> int:
    """Of a sample's completion, on this context-parallel rank."""
    prompt, completion = lengths
    length = _fed_length(config, layout, lengths)
    spans = held_spans(length, layout.context, layout.coordinate(rank).cp)
    return sum(max(0, min(end, prompt + completion - 1) - max(first, prompt - 1)) for first, end in spans)


def _micro_batches(config: RunConfig, layout: Layout, lengths: tuple[int, int]) -> list[int]:
    """Samples of each micro-batch of the first replica."""
    training = config.training
    found = plan_micro_batches(
        [sum(lengths) - 1] * training.global_batch_size,
        data_parallel_size=layout.data,
        micro_batch_size=training.micro_batch_size,
        packing=config.data.packing,
        max_tokens=max_tokens(config, layout),
        multiple_of=layout.row_multiple,
        one_shape=layout.virtual_pipeline is not None,
    )
    return [len(batch) for batch in found[0]]


def _passing(config: RunConfig, arch: Architecture, layout: Layout, student: Layout, lengths: tuple[int, int]) -> float:
    """Of the teacher's pass, beside the signals that it makes."""
    length, budget = sum(lengths) - 1, teacher_max_tokens(config)
    found = plan_micro_batches(
        [length] * config.training.global_batch_size,
        data_parallel_size=layout.data,
        micro_batch_size=config.teacher.teacher_micro_batch_size or config.training.micro_batch_size,
        packing=config.data.packing,
        max_tokens=max(budget, length) if budget else max_tokens(config, student) if config.data.packing else None,
        allow_partial=True,
    )
    rows, width = max(map(len, found[0])), BYTES[config.model.precision]
    fed = Fed(arch, layout, width, rows, _fed_length(config, layout, lengths), config.data.packing)
    if config.distillation.gkd_logits_topk is None:
        return fed.passing()
    logits = width * min(_TOPK_TOKENS, rows * lengths[1]) * arch.padded_vocab_size(layout.tensor) / layout.tensor
    return max(fed.passing(), 4 * fed.hidden + logits)


def _fed_length(config: RunConfig, layout: Layout, lengths: tuple[int, int]) -> int:
    """Of a sequence, with padding."""
    multiple = layout.segment_multiple if config.data.packing else layout.row_multiple
    return round_up(sum(lengths) - 1, multiple)


class _Kept(NamedTuple):
    """Activations of the micro-batches in flight."""

    most: float
    at_loss: float  # of the last chunk's micro-batches
    at_embedding: float  # at the end of a backward pass of the first chunk
    recomputed: float  # of a group of layers


def _kept(config: RunConfig, fed: Fed, stage: int, micro_batches: int) -> _Kept:
    """At the moments that `_moments` asks about."""
    layout, recompute, largest = fed.layout, config.recompute, 0.0
    size = recompute.recompute_num_layers or 1
    chunks = stage_layers(fed.arch, layout, stage)
    layers_of: list[float] = []  # of a micro-batch, by chunk
    outputs: list[float] = []  # which go to the next chunk
    for index, layers in enumerate(chunks):
        whole = [fed.layer(layer, recompute.recompute_granularity) for layer in layers]
        of_one = sum(whole)
        if recompute.recompute_granularity == "full":
            of_one = fed.hidden * math.ceil(len(layers) / size)
            largest = max([largest, *(sum(whole[start : start + size]) for start in range(0, len(whole), size))])
        elif fed.width < 4 and (stage, index) != (0, 0):
            of_one += fed.hidden  # what came from the stage before; in fp32 the first norm has it
        layers_of.append(of_one)
        outputs.append(fed.hidden * ((stage, index) != (layout.pipeline - 1, len(chunks) - 1)))
    moments = [
        (chunk, sum(number * (a + b) for number, a, b in zip(counts, layers_of, outputs, strict=True)))
        for chunk, counts in held(layout, stage, micro_batches)
    ]
    at_loss = max(kept for chunk, kept in moments if chunk == len(chunks) - 1)
    first = max(kept for chunk, kept in moments if chunk == 0)
    # Of its own micro-batch there are the output, the gradients of output and embedding.
    at_embedding = first - layers_of[0] + outputs[0] + fed.whole
    return _Kept(max(kept for _, kept in moments), at_loss, at_embedding, largest)


def _moments(
    config: RunConfig,
    fed: Fed,
    stage: int,
    kept: _Kept,
    left: float,
    tokens: int,
    teaches: Architecture | None,
    tp: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """(forward, backward): activations and the loss at the peak."""
    arch, layout, width = fed.arch, fed.layout, fed.width
    shared = fed.whole if layout.sequence_parallel else 0.0  # megatron-core's buffer of gathered hidden states
    vocabulary = arch.padded_vocab_size(layout.tensor) // layout.tensor * arch.hidden_size
    transient = fed.whole + 2 * fed.hidden + width * fed.t * arch.ffn_hidden_size / layout.tensor
    passing = transient
    if kept.recomputed:  # its layer's input is among what is kept, what goes to the next stage is not there yet
        passing = fed.passing() - fed.hidden * (1 + (stage < layout.pipeline - 1))
    # A head that is the embedding as well waits for the embedding's gradient.
    waiting = width * vocabulary * (arch.tied_embeddings and layout.pipeline == 1)
    moments = [(kept.most + kept.recomputed + transient + waiting + shared, 0.0)]
    if stage == 0 and not config.model.freeze_embeddings:
        moments.append((width * vocabulary + waiting + left + kept.at_embedding + shared, 0.0))
    forwards = [(kept.most + passing + shared, 0.0)]
    if stage == layout.pipeline - 1:
        end = kept.at_loss + fed.norm() + shared
        rows = width * tokens * arch.hidden_size
        forwards.append((end, _chunk_bytes(config, fed, tokens, teaches, tp) + 2 * rows + 4 * vocabulary))
        moments.append((end + width * vocabulary, 4 * vocabulary + rows))
    forward, backward = (
        {"student: activations": of_layers, "loss": of_loss}
        for of_layers, of_loss in (max(forwards, key=sum), max(moments, key=sum))
    )
    return forward, backward


def _chunk_bytes(config: RunConfig, fed: Fed, tokens: float, teaches: Architecture | None, tp: int) -> float:
    """Of the buffers and temporaries of a chunk of the fused loss (loss/fused/dense.py, sparse.py)."""
    width, narrow, layout = fed.width, fed.width < 4, fed.layout
    known = fed.arch.vocab_size if teaches is None else min(fed.arch.vocab_size, teaches.vocab_size)
    each = fed.arch.padded_vocab_size(layout.tensor) // layout.tensor
    most_columns, columns = min(known, each), min(max(known - tp * each, 0), each)
    if teaches is not None and config.distillation.gkd_logits_topk is None:
        buffers, temporaries = 2 * width + 8 * narrow, 8 + 8
    else:
        with_support = config.distillation.gkd_logits_topk is not None
        # The scratch of a chunk, and the gradient once more in the logits' type.
        buffers, temporaries = width + 4 * narrow + 4 * with_support, 4 + width * (narrow and with_support)
    most = min(_CHUNK_TOKENS, max(1, _CHUNK_BYTES // (buffers * most_columns)))
    chunk = math.ceil(tokens / math.ceil(tokens / most))
    return chunk * (columns * (buffers + temporaries) + 4 * narrow * fed.arch.hidden_size)


def peak(phases: Phases) -> float:
    """Of a step: the fullest of its phases."""
    return max(sum(parts.values()) for name, parts in phases.items() if name != "load")
