"""The plan: every shard of a megatron-core parameter as rectangles of Hugging Face tensors. Pure arithmetic, no
tensors.

A shard is the concatenation, along dimension 0 and in order, of rectangles of HF tensors (or of zero rows: vocabulary
padding). One plan serves all uses: loading reads its rectangles, exporting writes them, and a test without weights
counts that the ranks cover every element of every HF tensor exactly once.

Transforms, for rank r of n tensor-parallel ranks (H hidden, h head_dim, A query heads, G KV heads, I ffn, V
vocabulary). Both sides store linear weights as [out, in] and use rotate-half RoPE, so nothing is transposed or permuted
within a head:

    replicated   the HF tensor unchanged, on every rank.
    columns      [H, X]: columns r*X/n .. (r+1)*X/n   (attention output X = A*h, down projection X = I).
    rows         [X, ...]: rows r*X/n .. (r+1)*X/n   (heads one after the other, X = A*h: latent attention, a norm over
                 all heads).
    vocabulary   [V, H] followed by zero rows up to the padded vocabulary; rows r*P/n .. (r+1)*P/n of that.
    qkv          [(A+2G)*h, H]: for each KV group g, the rows of its A/G query heads, of its key head, of its value
                 head; then equal chunks of these rows. This holds for n > G too, where a chunk may begin inside a
                 head. Biases likewise.
    gated        [2I/n, H]: chunk r of gate, then chunk r of up; NOT chunk r of [gate; up].

An expert is sharded over the expert-tensor-parallel ranks. With expert parallelism, rank r of n has experts
r*E/n .. (r+1)*E/n (chunks.py).

A wrong transform survives a round trip bit for bit, because export inverts import; only logits reveal it. So
tests/weights compares logits with transformers for every family and layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import LayoutError
from megatron_gkd.weights.naming import Unit, hf_names, layer_units, transform, vision_units

Span = tuple[int, int]  # start, stop


class Rectangle(NamedTuple):
    """Rows (and columns) of an HF tensor, or zero rows."""

    name: str | None  # None: `rows` zero rows of vocabulary padding
    rows: Span
    columns: Span | None = None  # None: all

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]


def units(arch: Architecture) -> Iterator[Unit]:
    """Every unit of the model that has HF tensors of its own, in the order of the HF checkpoint."""
    yield from vision_units(arch)
    yield Unit("embedding")
    for layer in range(arch.num_layers):
        yield from layer_units(arch, layer)
    yield Unit("final_norm")
    if not arch.tied_embeddings:
        yield Unit("head")


def unit_shapes(unit: Unit, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Full shapes of the HF tensors of a unit."""
    if unit.name is not None:
        assert arch.vision is not None, unit
        return {arch.vision.stored_name(unit.name): arch.vision.shapes[unit.name]}
    hidden, ffn, query, kv = arch.hidden_size, arch.ffn_hidden_size, arch.query_size, arch.kv_size
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "embedding": ((arch.vocab_size, hidden),),
        "attention_norm": ((hidden,),),
        "qkv": ((query, hidden), (kv, hidden), (kv, hidden)),
        "qkv_bias": ((query,), (kv,), (kv,)),
        "query_norm": ((arch.head_dim if arch.latent is None else arch.latent.query_rank or 0,),),
        "key_norm": ((arch.head_dim,),),
        "query_norm_over_heads": ((query,),),
        "key_norm_over_heads": ((kv,),),
        "attention_output": ((hidden, arch.attention_size),),
        "mlp_norm": ((hidden,),),
        "gate_up": ((ffn, hidden), (ffn, hidden)),
        "down": ((hidden, ffn),),
        "final_norm": ((hidden,),),
        "head": ((arch.vocab_size, hidden),),
    }
    if arch.moe is not None:
        expert = arch.moe.ffn_hidden_size
        shapes |= {
            "router": ((arch.moe.num_experts, hidden),),
            "correction_bias": ((arch.moe.num_experts,),),
            "shared_gate_up": ((arch.moe.shared_ffn_hidden_size, hidden),) * 2,
            "shared_down": ((hidden, arch.moe.shared_ffn_hidden_size),),
            "shared_gate": ((1, hidden),),
            "expert_gate_up": ((expert, hidden), (expert, hidden)),
            "expert_down": ((hidden, expert),),
        }
    if arch.latent is not None:
        latent, heads = arch.latent, arch.num_heads
        rank = latent.query_rank or 0
        shapes |= {
            "query": ((query, hidden),),
            "query_down": ((rank, hidden),),
            "query_up": ((query, rank),),
            "latent_down": ((latent.kv_rank + latent.rotary_dim, hidden),),
            "latent_norm": ((latent.kv_rank,),),
            "latent_up": ((heads * (latent.plain_dim + latent.value_dim), latent.kv_rank),),
        }
    return dict(zip(hf_names(unit, arch), shapes[unit.role], strict=True))


def hf_tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The manifest: every tensor of a checkpoint of this architecture, in order. A tied head is not in it."""
    manifest: dict[str, tuple[int, ...]] = {}
    for unit in units(arch):
        manifest |= unit_shapes(unit, arch)
    return manifest


def plan(unit: Unit, arch: Architecture, rank: int, size: int, padded_vocab: int) -> tuple[Rectangle, ...]:
    """Rectangles of rank `rank` of `size` tensor-parallel ranks (for an expert: expert-tensor-parallel ranks), in the
    order of the shard's rows."""
    assert 0 <= rank < size, (rank, size)
    role = unit.role
    shapes = unit_shapes(unit, arch)
    names = tuple(shapes)
    match transform(unit):
        case "replicated":
            return (Rectangle(names[0], (0, shapes[names[0]][0])),)
        case "columns":
            rows, columns = shapes[names[0]]
            return (Rectangle(names[0], (0, rows), _chunk(role, columns, rank, size)),)
        case "rows":
            return (Rectangle(names[0], _chunk(role, shapes[names[0]][0], rank, size)),)
        case "vocabulary":
            return tuple(cut(_padded_rows(names[0], arch, padded_vocab), _chunk(role, padded_vocab, rank, size)))
        case "qkv":
            return tuple(cut(_grouped_rows(names, arch), _chunk(role, arch.query_size + 2 * arch.kv_size, rank, size)))
        case "gated":
            return tuple(Rectangle(name, _chunk(role, shapes[name][0], rank, size)) for name in names)


def shard_shape(unit: Unit, arch: Architecture, rectangles: tuple[Rectangle, ...]) -> tuple[int, ...]:
    """Shape of the megatron-core parameter that these rectangles fill."""
    full = next(iter(unit_shapes(unit, arch).values()))
    columns = rectangles[0].columns
    rest = full[1:] if columns is None else (columns[1] - columns[0],)
    return (sum(rectangle.num_rows for rectangle in rectangles), *rest)


def _chunk(role: str, total: int, rank: int, size: int) -> Span:
    if total % size != 0:
        raise LayoutError(f"{role}: {total} rows or columns do not divide over {size} tensor-parallel ranks")
    part = total // size
    return rank * part, (rank + 1) * part


def _padded_rows(name: str, arch: Architecture, padded_vocab: int) -> Iterator[Rectangle]:
    if padded_vocab < arch.vocab_size:
        raise LayoutError(f"padded vocabulary {padded_vocab} is below the vocabulary of {arch.vocab_size}")
    yield Rectangle(name, (0, arch.vocab_size))
    yield Rectangle(None, (0, padded_vocab - arch.vocab_size))


def _grouped_rows(names: tuple[str, ...], arch: Architecture) -> Iterator[Rectangle]:
    """All rows of q, k and v in megatron-core's order: group by group."""
    query, key, value = names
    h = arch.head_dim
    heads_h = arch.num_heads // arch.num_kv_heads * h
    for group in range(arch.num_kv_heads):
        yield Rectangle(query, (group * heads_h, (group + 1) * heads_h))
        yield Rectangle(key, (group * h, (group + 1) * h))
        yield Rectangle(value, (group * h, (group + 1) * h))


def cut(rectangles: Iterable[Rectangle], window: Span) -> Iterator[Rectangle]:
    """The part of the concatenated rows that lies in `window`."""
    position = 0
    for rectangle in rectangles:
        start = max(window[0] - position, 0)
        stop = min(window[1] - position, rectangle.num_rows)
        if start < stop:
            first = rectangle.rows[0]
            yield rectangle._replace(rows=(first + start, first + stop))
        position += rectangle.num_rows
