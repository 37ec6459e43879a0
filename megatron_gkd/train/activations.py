"""Activations that a student keeps for its backward pass, in closed form. No tensors.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4, for the layers
that are built here without Transformer Engine: RMS norms that keep fp32, SwiGLU, grouped queries whose keys and values
are repeated, attention without a score matrix, no dropout. Bytes of a micro-batch with t tokens on a context-parallel
rank; u = t / tp under sequence parallelism, else t; w bytes of a number, H hidden size; a, g: width of a rank's
queries, of its keys; h: its heads; e: its share of the MLP's width

    norm         8 u H + 4 u    input (fp32: itself) and normalised input; and its output w u H
    q, k norm    8 t (a + g) + 4 t (heads)
    attention    w t (a + a + a), of repeated keys and values, + w t a, the output, + 4 t h, the log-sum-exp
                 w t a once more where sequences are put together again: packed, several rows, context parallelism
                 w 4 s d: cosines and sines of s positions, of queries and of keys
    MLP          5 w t e        both halves, the activation, the linear half again (+ 0), their product
    experts      n = u k etp tokens, even loads: w n (H + 6 f) + 4 n, f an expert's width; router u (E (4 + 1) + 24 k)
    selective    core_attn: w t (a + g + a), and what keys and values are cut from, w t (a + 2 g)
    full         w u H a group of layers; in the backward pass one group is there whole (formula.py)

In flight: a stage p of P begins with W forward passes, then makes one forward and one backward pass by turns until it
has made the T = m v forward passes of m micro-batches through its v chunks, then backward passes alone

    W = min(T, P - p - 1), interleaved min(T, 2 (P - p - 1) + (v - 1) N), in groups of N micro-batches (schedule.py)

Forward passes go group by group through the chunks, backward passes likewise through the chunks from the last one on.
So what chunk c holds when backward pass k begins is a count: its forward passes among the first min(T, W + k + 1), less
its backward passes among the first k (`held`). In sum that is min(T, W + 1) until forward passes end.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gkd.architecture import Architecture
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.schedule import micro_batch_group


@dataclass(frozen=True)
class Fed:
    """A model on a rank, and the micro-batch that it is fed."""

    arch: Architecture
    layout: Layout
    width: int  # bytes of a number
    rows: int  # sequences
    length: int  # of each, with padding
    packed: bool

    @property
    def t(self) -> float:
        return self.rows * self.length / self.layout.context

    @property
    def u(self) -> float:
        return self.t / self.layout.tensor if self.layout.sequence_parallel else self.t

    @property
    def hidden(self) -> float:
        """Bytes of hidden states of a rank: w u H."""
        return self.width * self.u * self.arch.hidden_size

    @property
    def whole(self) -> float:
        """The same without sequence parallelism."""
        return self.width * self.t * self.arch.hidden_size

    @property
    def widths(self) -> tuple[float, float, float, int]:
        """(queries, keys, heads, groups of keys) of a rank."""
        groups, heads = max(1, self.arch.num_kv_heads // self.layout.tensor), self.arch.num_heads / self.layout.tensor
        return heads * self.arch.head_dim, groups * self.arch.head_dim, heads, groups

    @property
    def cut_from(self) -> float:
        """Bytes of queries, keys and values in one tensor; of the whole model where ranks share a head of keys."""
        size = self.layout.tensor if self.layout.tensor <= self.arch.num_kv_heads else 1
        return self.width * self.t * (self.arch.query_size + 2 * self.arch.kv_size) / size

    @property
    def n(self) -> float:
        """Tokens of a rank's experts."""
        return self.u * (0 if self.arch.moe is None else self.arch.moe.top_k) * self.layout.expert_tensor_size

    def norm(self) -> float:
        """With its output."""
        return 8 * self.u * self.arch.hidden_size + 4 * self.u + self.hidden

    def attention(self, *, recomputed: bool) -> float:
        """Between the norm and the output projection."""
        arch, w, t, (a, g, heads, groups) = self.arch, self.width, self.t, self.widths
        repeats, has_mixed = heads > groups, False
        kept = 4 * arch.head_dim * w * (t if self.packed else t / self.rows)
        if arch.qk_norm:
            kept += 8 * t * (a + g) + 4 * t * (heads + groups)
            if w == 4:  # keys are a part of what they were cut from; so are queries, unless they were copied
                has_mixed = True
                kept += self.cut_from - 4 * t * (g if repeats and groups > 1 else a + g)
        if recomputed:
            return kept + w * t * (a + g + a) + (not has_mixed) * self.cut_from
        together = self.packed or self.rows > 1 or self.layout.context > 1
        kept += w * t * a * (2 + together) + 4 * t * heads
        if self.layout.context > 1:
            return kept + self._gathered(a, g, repeats)
        if repeats:
            return kept + 2 * w * t * a
        return kept + w * t * g + (not has_mixed) * self.cut_from

    def _gathered(self, a: float, g: float, repeats: bool) -> float:
        """Keys and values that a rank's two chunks see of whole sequences."""
        part = self.length / self.layout.context / 2
        keys = 2 * (part + self.length) * a if repeats else 2 * self.length * g  # of both chunks
        return self.width * self.rows * keys

    def mlp(self, layer: int) -> float:
        """Behind its norm."""
        arch, w, moe = self.arch, self.width, self.arch.moe
        if moe is None or not arch.has_experts(layer):
            return 5 * w * self.t * arch.ffn_hidden_size / self.layout.tensor
        n, f = self.n, moe.ffn_hidden_size / self.layout.expert_tensor_size
        router = self.u * (5 * moe.num_experts + 24 * moe.top_k)
        shared = 5 * w * self.t * moe.shared_ffn_hidden_size / self.layout.tensor
        return router + shared + w * n * (arch.hidden_size + 6 * f) + 4 * n

    def passing(self) -> float:
        """At the peak of a layer that keeps nothing: in a norm, in attention, or in the MLP or its experts."""
        arch, w, t, (a, g, heads, groups) = self.arch, self.width, self.t, self.widths
        attention = w * t * ((1 + arch.qk_norm) * (a + g) + (3 if heads > groups else 1) * a) + self.cut_from
        mlp = 5 * w * t * arch.ffn_hidden_size / self.layout.tensor
        if arch.moe is not None:
            mlp = 5 * w * self.n * arch.hidden_size
        return 4 * self.hidden + max(12 * self.u * arch.hidden_size, attention, mlp)

    def left(self, layer: int, granularity: str) -> float:
        """What a layer with experts holds until its next pass: megatron-core's dispatcher keeps the router's
        probabilities and map and, through their graph, the input of a recomputed layer and its gradient."""
        if self.arch.moe is None or not self.arch.has_experts(layer):
            return 0.0
        return 2 * self.hidden * (granularity == "full") + 5 * self.u * self.arch.moe.num_experts

    def layer(self, layer: int, granularity: str) -> float:
        """Of a layer that is not recomputed whole."""
        return 2 * self.norm() + self.attention(recomputed=granularity == "selective") + self.mlp(layer)


def held(layout: Layout, stage: int, micro_batches: int) -> list[tuple[int, list[int]]]:
    """Of each backward pass of a stage: the chunk that it is of, and the micro-batches of which each model chunk holds
    activations when it begins, its own among them."""
    size, chunks = layout.pipeline, layout.num_chunks
    group, warmup = micro_batches, size - stage - 1
    if chunks > 1:  # with micro-batches of padding where there are fewer than stages (model/pipeline.py)
        micro_batches = max(micro_batches, size)
        group = micro_batch_group(micro_batches, size)
        warmup = 2 * warmup + (chunks - 1) * group
    groups = [min(group, micro_batches - first) for first in range(0, micro_batches, group)]
    order = [chunk for number in groups for chunk in range(chunks) for _ in range(number)]
    counts = [0] * chunks
    moments: list[tuple[int, list[int]]] = []
    for chunk in order[:warmup]:
        counts[chunk] += 1
    for k, forward in enumerate(order):
        for chunk in order[warmup + k : warmup + k + 1]:
            counts[chunk] += 1
        backward = chunks - 1 - forward
        moments.append((backward, counts.copy()))
        counts[backward] -= 1
    return moments
