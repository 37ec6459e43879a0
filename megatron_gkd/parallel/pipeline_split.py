"""The number of layers of each pipeline stage, where they are not distributed evenly. Plain numbers, no torch.

    PipelineSplit(first=2).chunk_layers(10, stages=3, chunks=1)          -> (2, 4, 4)
    PipelineSplit(embedding=True, loss=True).chunk_layers(10, 4, 1)      -> (2, 3, 3, 2)
    PipelineSplit(layers=parse_layout("Et*3|t*4|t*3L"))                  -> (3, 4, 3)

Counts are of model chunks in the order of the model: chunk v of stage p is number v * stages + p. Without a virtual
pipeline a stage is one chunk. Messages name the flags; `prefix` is `teacher_` for the teacher's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from megatron_gkd.errors import LayoutError

_MOST_CHARACTERS: Final = 10_000  # of a layout with its repeats written out


@dataclass(frozen=True)
class PipelineSplit:
    """One of Megatron's three forms: layers of the first and the last stage; even shares in which the embedding and the
    loss count as layers; or the layers of every stage."""

    first: int | None = None
    last: int | None = None
    embedding: bool = False
    loss: bool = False
    layers: tuple[int, ...] | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        forms = {
            f"--{self.prefix}decoder_first_pipeline_num_layers or _last_": (self.first or self.last) is not None,
            f"--{self.prefix}account_for_embedding_in_pipeline_split or _loss_": self.embedding or self.loss,
            f"--{self.prefix}pipeline_model_parallel_layout": self.layers is not None,
        }
        if sum(forms.values()) > 1:
            given = " and ".join(name for name, is_given in forms.items() if is_given)
            raise LayoutError(f"{given} both say how layers are shared by pipeline stages; give one of them")

    def __str__(self) -> str:
        if self.layers is not None:
            return f"layers {'+'.join(map(str, self.layers))}"
        parts = [f"{count} in the {end} stage" for end, count in (("first", self.first), ("last", self.last)) if count]
        parts += [f"{end} counted as a layer" for end in ("embedding", "loss") if getattr(self, end)]
        return f"layers: {', '.join(parts)}"

    def chunk_layers(self, num_layers: int, stages: int, chunks: int) -> tuple[int, ...]:
        """Layers of each chunk, in the order of the model. Raises LayoutError with numbers that would work."""
        if stages == 1:
            raise LayoutError(f"{self}: there is one pipeline stage; give more, or leave the split out")
        if self.layers is not None:
            return self._written(num_layers, stages, chunks)
        if self.embedding or self.loss:
            return self._counted(num_layers, stages, chunks)
        return self._at_the_ends(num_layers, stages, chunks)

    def _written(self, num_layers: int, stages: int, chunks: int) -> tuple[int, ...]:
        layers = self.layers or ()
        flag = f"--{self.prefix}pipeline_model_parallel_layout"
        if len(layers) != stages * chunks:
            raise LayoutError(
                f"{flag} has {len(layers)} stages, and the layout {stages} x {chunks} chunks = {stages * chunks}: "
                "change it, or the number of stages (--virtual_pipeline_model_parallel_size for several chunks each)"
            )
        if sum(layers) != num_layers:
            raise LayoutError(f"{flag} has {sum(layers)} layers (t), and the model {num_layers}")
        if 0 in layers[1:-1]:
            raise LayoutError(f"{flag}: stage {layers.index(0, 1) + 1} of {len(layers)} has nothing; give it a layer")
        return layers

    def _counted(self, num_layers: int, stages: int, chunks: int) -> tuple[int, ...]:
        units, parts = num_layers + self.embedding + self.loss, stages * chunks
        if units % parts:
            counted = " with the embedding" * self.embedding + " with the loss" * self.loss
            raise LayoutError(
                f"{num_layers} layers{counted} are {units}, which {parts} chunks do not share evenly "
                f"({stages} stages x {chunks}): give sizes that divide {units}, or "
                f"--{self.prefix}pipeline_model_parallel_layout"
            )
        counts = [units // parts] * parts
        counts[0] -= self.embedding
        counts[-1] -= self.loss
        return tuple(counts)

    def _at_the_ends(self, num_layers: int, stages: int, chunks: int) -> tuple[int, ...]:
        ends = [count for count in (self.first, self.last) if count is not None]
        rest, middle = num_layers - sum(ends), stages - len(ends)
        if rest < middle or (rest % middle if middle else rest):
            raise LayoutError(
                f"{self}: {rest} of {num_layers} layers are left for {middle} other stages; give numbers that leave a "
                "multiple of them"
            )
        each = rest // middle if middle else 0
        per_stage = [each] * stages
        per_stage[0] = self.first or per_stage[0]
        per_stage[-1] = self.last or per_stage[-1]
        if odd := [count for count in per_stage if count % chunks]:
            raise LayoutError(f"{self}: {odd[0]} layers of a stage do not divide into its {chunks} chunks")
        return tuple(count // chunks for _ in range(chunks) for count in per_stage)


def parse_layout(text: str, *, prefix: str = "") -> tuple[int, ...]:
    """Layers of each stage of Megatron's `E t t | t t | t L`: `*n` repeats a letter or a part in parentheses, commas
    and blanks mean nothing. Raises LayoutError."""
    flag = f"--{prefix}pipeline_model_parallel_layout {text[:200]}"
    plain = re.sub(r"[,\s]", "", text)
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([A-Za-z])\*(\d+)"):
        while (found := re.search(pattern, plain)) is not None:
            repeats = int(found[2])
            if repeats * len(found[1]) > _MOST_CHARACTERS or len(plain) > _MOST_CHARACTERS:
                raise LayoutError(f"{flag}: repeated {repeats} times it is not a layout of a model")
            plain = plain[: found.start()] + found[1] * repeats + plain[found.end() :]
    if unknown := sorted(set(plain) - set("EtL|")):
        raise LayoutError(
            f"{flag}: {' '.join(unknown)} is not known; E is the embedding, t a layer, L the loss, | ends a stage"
        )
    letters = plain.replace("|", "")
    if not re.fullmatch("Et*L", letters):
        raise LayoutError(f"{flag}: it must begin with the one E and end with the one L, and have t between them")
    return tuple(stage.count("t") for stage in plain.split("|"))
