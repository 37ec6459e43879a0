"""The student: model chunks under megatron-core's DDP, its optimizer and learning-rate schedule, and one training step.

One step is exactly Megatron's: zero the gradient buffers, run the schedule (whose end, `finalize_model_grads`, sums
gradients over data-parallel ranks, over TP ranks for norms under sequence parallelism, over the two ends of the
pipeline for tied embeddings, and divides once by the global number of loss tokens), clip, update.

Loss contract (`calculate_per_token_loss`): the loss function returns (loss_sum, num_tokens, report); nothing is
divided per micro-batch. So the gradient, and its norm, do not depend on TP, PP, VPP, DP or the micro-batch size.

Offload (config/levers.py, `OffloadConfig`): between uses, weights, gradient buffers and the optimizer's state may be in
host memory. `chunks`, `models` and `optimizer` bring back what they return; `leave_device` moves it out, and the
optimizer's state is moved out after each update.

A step whose loss or gradient norm is not finite makes no update: weights, moments and the optimizer's step count do not
change. megatron-core itself (0.16) only skips a step on fp16 overflow, and would write NaN everywhere. The learning
rate is a function of the step's number, so the schedule advances in such a step as well.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.config.levers import OffloadConfig
from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.parked import Parked
from megatron_gkd.model.pipeline import ForwardStep, run_schedule
from megatron_gkd.model.quantised import is_quantised
from megatron_gkd.model.router import Routers
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.overlap import connect
from megatron_gkd.train.vision import freeze_towers
from megatron_gkd.weights.chunks import settle


@dataclass(frozen=True)
class StepResult:
    """What one update did, the same on every rank but for `reports`."""

    reports: list[Any]  # of this rank's micro-batches; empty outside the last stage
    grad_norm: float  # of the whole model's gradient, before clipping; NaN after an fp16 overflow
    learning_rate: float
    skipped: bool  # no update was made
    problem: str | None  # why, in words; None for an fp16 overflow, after which the loss scale is lowered


class Student:
    """Model chunks, optimizer and schedule of the model being trained."""

    def __init__(
        self,
        chunks: Sequence[HiddenStateGPTModel],
        layout: Layout,
        groups: ProcessGroupCollection,
        training: TrainingConfig,
        options: ModelOptions,
        *,
        train_iters: int,
        use_distributed_optimizer: bool = False,
        freeze_embeddings: bool = False,
        freeze_router: bool = False,
        freeze_vision: bool = False,
        freeze_projector: bool = False,
        optimizer_options: Mapping[str, Any] | None = None,
        empty_unused_memory_level: int = 0,
        offload: OffloadConfig | None = None,
    ) -> None:
        """Args:
        optimizer_options: further fields of megatron-core's OptimizerConfig (model/levers.py).
        empty_unused_memory_level: when to free cached device memory: 1 before the update, 2 also after it.
        offload: what is in host memory between its uses; None: nothing.
        """
        if freeze_embeddings:
            _freeze_embeddings(chunks)
        freeze_towers(chunks, tower=freeze_vision, projector=freeze_projector)
        self.routers = Routers(chunks, groups)
        if freeze_router:
            self.routers.freeze()
        if options.recompute_granularity is not None:
            _ask_for_gradients(chunks)
        self.layout, self.groups, self.train_iters = layout, groups, train_iters
        self._empty_unused_memory_level = empty_unused_memory_level
        self.config = chunks[0].config
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=use_distributed_optimizer, **options.ddp_fields())
        self._chunks = [
            # As Megatron's own training does: one bucket in all chunks but the first.
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0, pg_collection=groups)
            for index, chunk in enumerate(chunks)
        ]
        connect(self._chunks, self.config)
        if not options.fp8_param:  # quantised tensors are not sent; all ranks have read and rounded the same
            for chunk in self._chunks:
                chunk.broadcast_params()
        with _world_is(groups.intra_dist_opt):
            self._optimizer: MegatronOptimizer = get_megatron_optimizer(
                _optimizer_config(
                    training, self.config.params_dtype, use_distributed_optimizer, optimizer_options or {}
                ),
                self._chunks,
                use_gloo_process_groups=False,
                pg_collection=groups,
            )
        _initialise_adam_state(self._optimizer)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self._optimizer.scale_loss
        self._of_model, self._of_optimizer = self._parked(offload or OffloadConfig())
        self.scheduler = OptimizerParamScheduler(
            self._optimizer,
            init_lr=0.0,
            max_lr=training.lr,
            min_lr=training.min_lr,
            lr_warmup_steps=training.warmup_steps(train_iters),
            # Update k = 1..N uses the schedule at k of N + 1: neither the first update (warm-up from 0) nor the last
            # (decay to 0) is wasted.
            lr_decay_steps=train_iters + 1,
            lr_decay_style=training.lr_decay_style,
            start_wd=training.weight_decay,
            end_wd=training.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # A resumed run goes on at its step of the schedule that it is given, not of the one that was saved.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    @property
    def highest_learning_rate(self) -> float:
        """The largest of all updates of the run: that of the last warm-up step, or of the first step without
        warm-up."""
        now = self.scheduler.num_steps
        self.scheduler.num_steps = max(self.scheduler.lr_warmup_steps, 1)
        highest = float(self.scheduler.get_lr(self._optimizer.param_groups[0]))
        self.scheduler.num_steps = now
        return highest

    @property
    def chunks(self) -> list[DistributedDataParallel]:
        """Model chunks in their DDP wrappers, on the device."""
        for part in self._of_model:
            part.come_back()
        return self._chunks

    @property
    def models(self) -> list[HiddenStateGPTModel]:
        """The chunks without their DDP wrappers, on the device."""
        return [chunk.module for chunk in self.chunks]

    @property
    def optimizer(self) -> MegatronOptimizer:
        """The optimizer, with its state and the weights on the device."""
        for part in (*self._of_model, *self._of_optimizer):
            part.come_back()
        return self._optimizer

    def leave_device(self) -> None:
        """Move offloaded tensors to host memory until they are used again. Collective with --overlap_param_gather."""
        if self._of_model and not any(part.num_bytes for part in self._of_model):
            settle(self._chunks)  # what is gathered beside the computation has arrived
        for part in (*self._of_model, *self._of_optimizer):
            part.leave()

    def _parked(self, offload: OffloadConfig) -> tuple[tuple[Parked, ...], tuple[Parked, ...]]:
        """(of the model, of the optimizer). Main weights that share the model's memory belong to the model."""
        device = next(self._chunks[0].parameters()).device

        def weights() -> list[torch.Tensor]:
            """Those in fp8 have no memory of their own: it is in the buffers that they are gathered in."""
            parameters: list[torch.Tensor] = [weight for chunk in self._chunks for weight in chunk.parameters()]
            plain = [parameter for parameter in parameters if not is_quantised(parameter)]
            if len(plain) == len(parameters):
                return plain
            buffers = (b for chunk in self._chunks for b in chunk.buffers + chunk.expert_parallel_buffers)
            return plain + [buffer.param_data for buffer in buffers]

        def gradients() -> list[torch.Tensor]:
            return [
                buffer.grad_data for chunk in self._chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers
            ]

        def state() -> list[torch.Tensor]:
            own = {weight.untyped_storage() for weight in weights()}
            return [t for t in optimizer_tensors(self._optimizer) if t.untyped_storage() not in own]

        of_model = (Parked(weights, device), Parked(gradients, device, keep=False)) if offload.offload_model else ()
        return of_model, (Parked(state, device),) if offload.offload_optimizer else ()

    def train_step(
        self,
        forward_step: ForwardStep,
        micro_batches: Sequence[MicroBatch],
        loss_is_finite: Callable[[list[Any]], bool] = lambda reports: True,
        *,
        num_loss_tokens: int | None = None,
    ) -> StepResult:
        """One update from this data-parallel rank's micro-batches. Collective over all ranks of the layout.

        Args:
            loss_is_finite: given this rank's reports, between the backward pass and the update; the same answer on
                every rank, so it may make collectives.
            num_loss_tokens: of the step, over all replicas; needed where routers have a load-balancing loss.
        """
        self.routers.begin(num_loss_tokens, len(micro_batches) * self.layout.data)
        chunks = self.chunks
        for chunk in chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        reports = run_schedule(chunks, self.layout, self.groups, forward_step, micro_batches, forward_only=False)
        self.scheduler.step(increment=1)
        self._empty_unused_memory(1)
        grad_norm, updated, problem = self._update(loss_is_finite(reports))
        for part in self._of_optimizer:
            part.leave()
        self._empty_unused_memory(2)
        return StepResult(reports, grad_norm, float(self._optimizer.param_groups[0]["lr"]), not updated, problem)

    def _empty_unused_memory(self, level: int) -> None:
        if self._empty_unused_memory_level >= level:
            torch.cuda.empty_cache()

    def _update(self, loss_is_finite: bool) -> tuple[float, bool, str | None]:
        """megatron-core's optimizer step, stopped before the update if the loss or the gradient norm is not finite.
        Returns the norm, whether the update was made, and why not."""
        optimizer: Any = self.optimizer
        get_norm, apply, norms = optimizer.get_grad_norm, optimizer.step_with_ready_grads, list[float]()

        def noted_norm() -> float:
            norms.append(float(get_norm()))
            return norms[-1]

        optimizer.get_grad_norm = noted_norm
        optimizer.step_with_ready_grads = lambda: loss_is_finite and math.isfinite(norms[-1]) and apply()
        try:
            updated, _, _ = optimizer.step()
        finally:
            del optimizer.get_grad_norm, optimizer.step_with_ready_grads
        if not norms:  # the loss scaler has found an overflow; its loss scale is lowered, as far as that goes
            smallest = float(optimizer.get_loss_scale()) <= optimizer.config.min_loss_scale
            overflow = "the gradient overflows at the smallest loss scale" if smallest else None
            return math.nan, False, overflow if loss_is_finite else "the loss is not finite"
        problem = None if loss_is_finite else "the loss is not finite"
        if not math.isfinite(norms[-1]):
            problem = problem or f"the gradient's norm is {norms[-1]}"
        return norms[-1], bool(updated), problem

    @torch.no_grad()
    def forward_only(self, forward_step: ForwardStep, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """The reports of this data-parallel rank's micro-batches without gradients (evaluation)."""
        for chunk in self.chunks:
            chunk.eval()
        return run_schedule(self.chunks, self.layout, self.groups, forward_step, micro_batches, forward_only=True)


@contextlib.contextmanager
def _world_is(group: dist.ProcessGroup) -> Iterator[None]:
    """While an optimizer is made, the world is the student's ranks. megatron-core (0.16) compares the parameter groups
    of all ranks of WORLD, including the teacher's own ranks, which make no optimizer."""
    gather, size = dist.all_gather_object, dist.get_world_size

    def size_here(group: dist.ProcessGroup | None = None, world: dist.ProcessGroup = group) -> int:
        return size(group or world)

    dist.all_gather_object, dist.get_world_size = functools.partial(gather, group=group), size_here
    try:
        yield
    finally:
        dist.all_gather_object, dist.get_world_size = gather, size


def _optimizer_config(
    training: TrainingConfig, dtype: torch.dtype, use_distributed_optimizer: bool, options: Mapping[str, Any]
) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_distributed_optimizer=use_distributed_optimizer,
        **options,
    )


def optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Main weights and optimizer state."""
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = member.optimizer
        if inner is None:  # of a rank without a parameter
            continue
        yield from (param for group in inner.param_groups for param in group["params"])
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def _initialise_adam_state(optimizer: MegatronOptimizer) -> None:
    """Create the zero state of torch's AdamW now instead of in its first step, because megatron-core's sharded state
    dict (0.16) reads the step count from it and fails on an empty one. The optimizers of apex and Transformer Engine
    keep it elsewhere and are skipped."""
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = member.optimizer
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            continue
        for param in (param for group in inner.param_groups for param in group["params"]):
            inner.state[param] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }


def _ask_for_gradients(chunks: Sequence[HiddenStateGPTModel]) -> None:
    """Make a frozen embedding's output require a gradient. Recomputation is a re-entrant autograd function: if no input
    requires a gradient, its output does not either, and the parameters inside silently get none (megatron-core 0.16 to
    0.19, tensor_parallel/random.py). The gradient that arrives at the embedding's output is dropped."""

    def ask(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        frozen = torch.is_grad_enabled() and not output.requires_grad
        return output.requires_grad_() if frozen else output

    for chunk in chunks:
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(ask)


def _freeze_embeddings(chunks: Sequence[HiddenStateGPTModel]) -> None:
    """Freeze the embedding, and the head if it is tied, so that both copies of a tied weight, on the first and the last
    stage, stay equal."""
    for chunk in chunks:
        if chunk.pre_process:
            chunk.embedding.word_embeddings.weight.requires_grad_(False)
        if chunk.post_process and chunk.share_embeddings_and_output_weights:
            chunk.head_weight().requires_grad_(False)
