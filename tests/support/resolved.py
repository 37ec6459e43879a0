"""What a configuration comes to: everything that a run of it would be told, computed by the program's own functions,
with recorders in place of what is slow or needs other machines (models, optimizers, engines, servers, files).

    resolved(config, "train", place) == resolved(other, "train", place)    two flags' values mean the same run

On one gloo rank; the layouts are those of WORLD ranks. Rows are fake and long, so that micro-batches differ. Not here,
because they are read inside the loop itself: `APART` (tests/config/test_every_flag_has_an_effect.py says who reads
them).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.dtypes import chosen
from megatron_gkd.config.not_built import Command
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import SelfTeaching, ServerTeachers
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.collate import collate
from megatron_gkd.data.dataset import Rows
from megatron_gkd.records import Row, Sample
from megatron_gkd.rollout import engines as engines_module
from megatron_gkd.rollout.vllm import colocate, server
from megatron_gkd.teacher.signals import HiddenSignal, Signal, TopKSignal
from megatron_gkd.train import (
    auto_resume,
    evaluate,
    generate,
    inputs,
    loop,
    resume,
    sampling,
    setup,
    teacher_sampling,
    teachers,
)
from megatron_gkd.train.faults import LossSpikes
from megatron_gkd.train.health import Health
from megatron_gkd.train.plans import StepPlans, evaluation_plans
from megatron_gkd.train.replicas import Replicas
from megatron_gkd.train.student import _optimizer_config
from megatron_gkd.train.timeline import Span
from megatron_gkd.weights import source

APART = ("logging_steps", "save_hf", "save_hf_dtype", "merge_lora", "max_bad_steps", "manual_gc", "manual_gc_interval")
WORLD, VOCAB, NUM_ROWS, STEPS = 8, 40, 96, 40
CLOCK = Clock("2026-11-27T12:00:00")


class FakeRows(Rows):
    """Rows of 1 to 600 tokens."""

    summary = SimpleNamespace(suspicious={}, first_suspicious={})
    sizes = (NUM_ROWS // 2, NUM_ROWS // 2)
    longest = 900

    def __init__(self, weights: Any = ()) -> None:
        self.weights = tuple(weights)

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        return Row((1,) * (1 + index * 37 % 600), (2,) * (1 + index % 7), None, "math")

    def place(self, index: int) -> str:
        return f"rows:{index}"

    def fingerprint(self) -> str:
        return repr(self.weights)

    def account(self) -> str:
        return "fake"

    def warnings(self) -> list[str]:
        return []

    def require(self, check: Any) -> None:
        """None is."""

    require_completions = require_teacher_prompts = require_ids_below = require  # type: ignore[assignment]


class Recorder:
    """Callables that note their arguments under a name, and return what they are told."""

    def __init__(self) -> None:
        self.calls: dict[str, list[str]] = {}

    def __call__(self, name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.note(name, args, sorted(kwargs.items()))
            return result(*args, **kwargs) if callable(result) else result

        return call

    def note(self, name: str, *what: Any) -> None:
        self.calls.setdefault(name, []).append("; ".join(map(_text, what)))


def _text(value: Any) -> str:
    """Values by value, and what has none by its type."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return _text(sorted(value.items()))
    plain = isinstance(value, str | int | float | bool | None | torch.dtype | Path) or hasattr(
        value, "__dataclass_fields__"
    )
    return repr(value) if plain else type(value).__name__


def resolved(config: RunConfig, command: Command, arch: Architecture) -> dict[str, list[str]]:
    """Name of a part -> what it is told. Raises GKDError where the run is refused on the way."""
    note = Recorder()
    config = replace(config, model=replace(config.model, dtype=chosen(config.model.dtype, "cpu")))
    student, teacher = inputs.layouts(config, WORLD)
    note.note("layouts", student, teacher)
    note.note("log level", config.logging.log_level)
    note.note("images", config.data.max_image_tiles, config.data.image_url_dir)
    note.note("tokenizers that are compared", config.model.model, config.teacher.teacher_model)
    with _without_machines(note):
        setup.join(config)
        fake: Any = SimpleNamespace(__len__=lambda: VOCAB)
        maker = inputs.row_maker(config)
        rows = inputs._training_rows(config, fake, VOCAB, CLOCK, inputs.Sight(), maker) if command == "train" else None
        eval_rows = inputs._eval_rows(config, fake, VOCAB, CLOCK, inputs.Sight(), maker)
        tokenizer: Any = _TOKENIZER
        given = inputs.Inputs(*(config, arch, arch, student, teacher, tokenizer, VOCAB, rows, eval_rows, CLOCK, (0,)))
        _note_teacher(note, given)
        if eval_rows is not None:
            note.note("packing of evaluations", config.data.packing)
            for plan in evaluation_plans(config, eval_rows, student, teacher):
                note.note("evaluations", plan.student, plan.teacher)
            note.note("evaluation", _measured(config, given))
        if rows is not None:
            _note_training(note, given)
        else:
            if config.generates:
                made: Any = SimpleNamespace(groups=SimpleNamespace(intra_dist_opt=dist.group.WORLD))
                made.chunks, made.models = [], []
                made.layout, made.train_iters, made.leave_device = student, 1, None
                where: Any = SimpleNamespace(device=torch.device("cpu"), kind="cpu")
                sampling.build_rollouts(given, where, made, generate.held_out_rows(given))
            _note_generation(note, given)
            note.note("model", config.model.model, config.model.dtype)
            _note_adapters(note, config)
    return note.calls


class _Tokenizer:
    def __len__(self) -> int:
        return VOCAB

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [len(text)]


_TOKENIZER = _Tokenizer()


def _note_adapters(note: Recorder, config: RunConfig) -> None:
    note.note("adapters", replace(config.tuner, merge_lora=False))


def _note_teacher(note: Recorder, given: inputs.Inputs) -> None:
    where: Any = SimpleNamespace(device=torch.device("cpu"), kind="cpu")
    reached = teachers.reach(given, where)
    if not (isinstance(given.config.teacher.kind, SelfTeaching) or given.config.base_teaches):
        reached.make(None)


def _note_training(note: Recorder, given: inputs.Inputs) -> None:
    config, rows, student = given.config, given.rows, given.student_layout
    assert rows is not None
    inputs.check_batch(config, student)
    where: Any = SimpleNamespace(device=torch.device("cpu"), kind="cpu")
    groups: Any = SimpleNamespace(intra_dist_opt=dist.group.WORLD)
    setup._build_student(given, where, groups)
    made: Any = SimpleNamespace(layout=student, groups=groups, chunks=[], models=[], train_iters=given.train_iters)
    made.leave_device = None
    note.note("replicas", Replicas(made, config.parallel.check_replicas_steps)._every)
    health = Health(config, vocab_size=VOCAB, done_steps=0, tells=True)
    note.note("health", None if health._is_off else (health._every, health._stops))
    note.note("spikes", LossSpikes(config.logging.loss_spike_factor)._factor)
    distillation = config.distillation
    if config.lmbda.most > 0 or config.generates:
        sampling.build_rollouts(given, where, made, generate.held_out_rows(given))
    _note_generation(note, given)
    if config.logging.log_completions and (config.lmbda.most > 0 or distillation.samples_teacher):
        note.note("completions", config.logging.num_completions_to_log)
    draws = given.draws
    if distillation.samples_teacher:
        needs = teachers.server_needs(given) if isinstance(config.teacher.kind, ServerTeachers) else None
        teacher_sampling.build_teacher_samples(given, needs)
    if config.sampling.vllm_mode == "server" and (config.lmbda.most > 0 or config.generates):
        note.note("servers are waited for", config.sampling.vllm_server_timeout)  # by sampling.check_servers
    length = sampling.engine_length(config, given.student_arch)
    plans = StepPlans(given)
    indices, _, sources = draws[0]
    sampled: Any = {p: ((3,) * (1 + p % 5), 0) for p, source in enumerate(sources) if source != "dataset"}
    plan = plans._with(0, sampled)
    note.note("step", indices, sources, plan.student, plan.teacher, config.data.packing)
    if config.lmbda.most > 0:
        steps = config.sampling.steps_per_generation, config.sampling.rollout_lag
        note.note("rollouts", [sampling.step_settings(given, step) for step in (0, STEPS - 1)], steps)
        note.note("requests", [(r.key, r.max_tokens, r.seed) for r in plans.requests(0)])
    if distillation.samples_teacher:
        asked = teacher_sampling.teacher_requests(config, draws[0], 0, length)
        note.note("teacher's requests", [(r.key, r.max_tokens, r.seed) for r in asked])
    note.note("loss", _loss(given, sources), distillation.fuse_loss)
    _note_start(note, given, plans, made)


def _note_generation(note: Recorder, given: inputs.Inputs) -> None:
    if given.config.generates:
        asked = [(request.key, request.max_tokens) for request in generate.prompt_requests(given)]
        note.note("greedy completions", asked, given.config.logging.eval_verifier)


def _note_start(note: Recorder, given: inputs.Inputs, plans: StepPlans, made: Any) -> None:
    """With a checkpoint in the run directory, and without."""
    for found in (True, False):
        with patch.object(auto_resume.Path, "glob", lambda self, pattern, found=found: iter([self] if found else [])):
            config = auto_resume.choose_start(given.config)
        run: Any = SimpleNamespace(
            config=config,
            plans=plans,
            student=made,
            architecture=given.student_arch,
            platform=SimpleNamespace(kind="cpu"),
            train_iters=STEPS,
            eval_rows=given.eval_rows,
        )
        with (
            patch.object(resume, "exports_at_end", lambda *args, **options: False),
            patch.object(resume, "set_aside_later", lambda *args: None),
        ):
            state, span = resume.begin(run)
        _note_span(note, span)
        resume.open_checkpoints(run)
        note.note("first step", auto_resume.first_step_to_write(config, state.step))
        loop._Writers(SimpleNamespace(config=config, is_writer=True), Path(config.checkpoint.save), first_step=0)  # type: ignore[arg-type]


def _note_span(note: Recorder, span: Span) -> None:
    steps = range(1, STEPS + 1)
    note.note("saves", [span.saves_after(step) for step in steps])
    if span.held_out:
        note.note("evaluates", [span.evaluates_after(step) for step in steps])


def _loss(given: inputs.Inputs, sources: Any) -> float:
    """Of eight samples with the sources of the step's first."""
    samples = [Sample(p, p, (1,), tuple((p + k) % VOCAB for k in range(3)), sources[p]) for p in range(8)]
    batch = collate(samples)
    model, hidden, signal, head = _tensors(given.config, len(batch.labels), batch.tokens.T.shape)
    loss = _objective(given, head)
    total, _, _ = loss(model, hidden, batch, signal)
    return round(float(total), 4)


def _measured(config: RunConfig, given: inputs.Inputs) -> list[float]:
    model, hidden, signal, head = _tensors(config, 24, (24, 1))
    found = evaluate.HeldOut(_objective(given, head)).measure(model, hidden.view(24, -1), torch.arange(24), signal)
    return [round(float(values.float().sum()), 4) for values in found.values()]


def _objective(given: inputs.Inputs, head: Any) -> Any:
    groups: Any = SimpleNamespace(tp=dist.group.WORLD)
    return setup.objective_of(given.config, groups, vocab_size=given.vocab_size, head=head)


def _tensors(config: RunConfig, num_loss_tokens: int, size: Sequence[int]) -> tuple[Any, torch.Tensor, Signal, Any]:
    draw = torch.Generator().manual_seed(5)
    head, teacher_head = (torch.randn(VOCAB, 8, generator=draw) for _ in range(2))
    hidden = torch.randn(*size, 8, generator=draw)
    told = torch.randn(num_loss_tokens, 8, generator=draw)
    model = SimpleNamespace(head_input=lambda rows: rows, head_weight=lambda: head, head_grad_is_reduced=True)
    topk = config.distillation.gkd_logits_topk
    if topk is None:
        return model, hidden, HiddenSignal(told), teacher_head
    values, ids = torch.log_softmax(told @ teacher_head.T, dim=1).topk(topk, dim=1)
    return model, hidden, TopKSignal(values, ids.int()), None


@contextlib.contextmanager
def _without_machines(note: Recorder) -> Iterator[None]:
    """Recorders in place of what is slow or needs others."""

    def rows(*args: Any, weights: Any = (), **kwargs: Any) -> FakeRows:
        return FakeRows(weights)

    def student(chunks: Any, layout: Any, groups: Any, training: Any, options: Any, **kwargs: Any) -> None:
        sharded, others = kwargs["use_distributed_optimizer"], kwargs["optimizer_options"]
        numbers = _optimizer_config(training, torch.float32, sharded, others)
        warmup = training.warmup_steps(kwargs["train_iters"])
        note.note("student", numbers, training.lr_decay_style, warmup, sorted(kwargs.items()))

    def teacher_samples(open_store: Any, **kwargs: Any) -> Any:
        store = open_store()
        note.note("teacher's store", sorted(vars(store.sampler).items()), store.settings, kwargs["window"])
        return SimpleNamespace(begin=lambda step: None)

    def trackers(names: Any, *args: Any, config: Any, **kwargs: Any) -> list[Any]:
        note.note("trackers", names, args, sorted(kwargs.items()))  # not the configuration, which holds all flags
        return []

    def sampler(*args: Any) -> Any:
        return SimpleNamespace(args=_text(args[0]))

    where = SimpleNamespace(device=torch.device("cpu"), kind="cpu")
    engine = SimpleNamespace(max_model_len=10**6)
    state = SimpleNamespace(step=3, clock="")
    noted: list[tuple[Any, str, Any]] = [
        *((module.platform, "setup", lambda *a: where) for module in (setup,)),
        (setup.platform, "init_distributed", None),
        (torch, "use_deterministic_algorithms", None),
        (inputs, "shared_rows", rows),
        (inputs, "StreamedRows", rows),
        (source, "build_model", []),
        (source, "HFTensorStream", None),
        *((teachers, name, None) for name in ("TeacherPipeline", "RemoteTeacher")),
        (teachers, "ServerTeacher", SimpleNamespace(prefetch=None)),
        *((sampling, name, None) for name in ("RolloutBridge", "Delivery")),
        (colocate, "ColocatedEngine", engine),
        *((server, name, engine) for name in ("ServerEngine", "SubprocessEngine")),
        (engines_module, "_check_lengths", None),
        (teacher_sampling, "CompletionCache", lambda *a: []),
        (teacher_sampling, "ServerSampler", sampler),
        *((resume, name, None) for name in ("load_initial_weights", "read_rollouts", "Checkpoints")),
        (resume, "choose_checkpoint", lambda path, **k: path),
        (resume, "load_checkpoint", state),
    ]
    quiet: list[tuple[Any, str, Any]] = [
        (setup, "require_same", lambda *a: None),
        (setup, "start_facts", lambda *a: {}),
        (setup, "Student", student),
        (setup, "put_adapters_on", lambda chunks, config, *_: _note_adapters(note, config)),
        (teachers, "signal_spec", lambda **k: None),
        (teachers, "build_groups", lambda layout: None),
        (sampling, "Rollouts", lambda *a, **k: None),
        (source.ModelSource, "load", lambda *a: None),
        (source.ModelSource, "manifest", lambda *a: {}),
        (inputs, "on_every_rank", lambda work, group: work()),
        (teacher_sampling, "stop_tokens", lambda *a: (0,)),
        (teacher_sampling, "ChatEncoder", lambda *a: None),
        (teacher_sampling, "fingerprint", lambda path: path),
        (teacher_sampling, "TeacherSamples", teacher_samples),
        (teacher_sampling, "_first_step", lambda load: 0),
        (resume, "replace", lambda state, **k: state),
        (resume, "describe_run", lambda *a: None),
        (loop, "JsonlWriter", lambda *a, **k: None),
        (loop, "open_trackers", trackers),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}))
        for module, name, result in noted:
            stack.enter_context(patch.object(module, name, note(f"{module.__name__}.{name}", result)))
        for module, name, function in quiet:
            stack.enter_context(patch.object(module, name, function))
        yield


def longer(arch: Architecture) -> Architecture:
    """With more positions than any --max_length here."""
    return replace(arch, max_position_embeddings=4096)
