"""Tower and projector of a vision-language model: transformers' own modules, on the first pipeline stage.

    whole sequence, every TP rank:   x = embedding(tokens)                  [S, B, H]
                                     x[placeholders] = rows(pictures)       [N, H], in reading order, sample by sample
    under sequence parallelism:      x = this rank's part of x              [S/tp, B, H]

The modules are replicated over the TP ranks, and their gradients are whole on each of them without a reduction,
because the merge comes BEFORE the scatter: the first layer's backward (without sequence parallelism) or the scatter's
(with it) gives every TP rank the gradient of all of x. So no parameter here may be marked `sequence_parallel`
(megatron-core would sum its gradient over TP) or `tensor_model_parallel` (the gradient's norm would count it once per
rank). Under context parallelism each rank computes all rows and takes those of its part of the sequence: its gradient
is partial, and DDP's sum over data and context parallel ranks completes it.

Other stages, and other chunks of this one, never see pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

from megatron_gkd.data.collate import Media
from megatron_gkd.errors import CheckpointError, DataError
from megatron_gkd.model.vision_config import FAMILIES, VisionPart, meta_model
from megatron_gkd.records import Picture

Prepare = Callable[[Sequence[Picture]], Mapping[str, torch.Tensor]]


class VisionTower(torch.nn.Module):
    """Tower and projector under transformers' names. `prepare` turns pictures into the tower's inputs
    (image_tokens.py)."""

    prepare: Prepare | None
    _model: Any  # transformers', without its decoder

    def __init__(self, part: VisionPart, dtype: torch.dtype) -> None:
        """Without values: `load_hf_weights` fills every parameter. On the meta device if that is the default device."""
        super().__init__()
        family, model = FAMILIES[part.family], meta_model(part.config_json, dtype)
        self.prepare = None
        self._projector = f"{family.projector}."
        for name in family.modules:
            setattr(self, name, getattr(model, name))
        for name in [name for name, _ in model.named_children() if name not in family.modules]:
            delattr(model, name)
        self.__dict__["_model"] = model  # for its get_image_features; as a child, its parameters would come twice
        if torch.empty(0).device.type != "meta":
            if next(self.parameters()).is_meta:  # a rehearsal's are not
                self.to_empty(device="cpu")
            _recompute_buffers(self)

    def rows(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """[N, H]: the decoder's inputs in place of the placeholders of these pictures, in order."""
        assert self.prepare is not None, "a model that sees pictures is told how to prepare them"
        like = next(self.parameters())
        inputs = {
            name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
            for name, tensor in self.prepare(pictures).items()
        }
        found = self._model.get_image_features(**inputs, return_dict=True).pooler_output
        rows: torch.Tensor = torch.cat(list(found)) if isinstance(found, list | tuple) else found
        return rows.reshape(-1, rows.shape[-1])

    def ask_instead(self, model: Any) -> None:
        """Compute image features with `model` instead of transformers' (train/rehearsed_pictures.py)."""
        self.__dict__["_model"] = model

    def freeze(self, *, tower: bool, projector: bool) -> None:
        """Do not train the tower's weights, the projector's, or both."""
        for name, parameter in self.named_parameters():
            if projector if name.startswith(self._projector) else tower:
                parameter.requires_grad_(False)

    def freeze_unused(self, picture: Picture) -> list[str]:
        """Freeze the weights that do not affect the rows (the last layer of LLaVA's tower), since weight decay would
        change them although their gradient is zero. They are found by a backward pass from the rows of `picture`.
        Returns their names."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not trained:
            return []
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.rows([picture]).sum(), list(trained.values()), allow_unused=True)
        unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
        for name in unused:
            trained[name].requires_grad_(False)
        return unused


def merged_input(
    embedding: Callable[..., torch.Tensor],
    tower: VisionTower,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    media: Media | None,
    *,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup,
) -> torch.Tensor:
    """The decoder's input [S(/tp), B, H]: embeddings of the tokens [B, S], with the pictures' rows in their places.

    `embedding` returns the whole sequence, also under sequence parallelism.
    """
    x: torch.Tensor = embedding(input_ids=tokens, position_ids=position_ids)
    if media is not None:
        rows = tower.rows(media.pictures)
        if len(rows) != media.num_rows:
            raise DataError(
                f"{', '.join(picture.name for picture in media.pictures)}: the vision tower gives {len(rows)} rows, "
                f"and the prompts have {media.num_rows} placeholders; use the processor's files of this model"
            )
        index = media.index.to(x.device)
        length = tokens.shape[1]
        x = x.index_put((index % length, index // length), rows[media.rows.to(x.device)].to(x.dtype))
    return scatter_to_sequence_parallel_region(x, group=tp_group) if sequence_parallel else x


def _recompute_buffers(module: torch.nn.Module) -> None:
    """Recompute the buffers that no checkpoint stores: positions, and the rotary frequencies of rows and columns."""
    for name, buffer in list(module.named_buffers()):
        owner_name, _, own_name = name.rpartition(".")
        owner: Any = module.get_submodule(owner_name)
        if own_name == "position_ids":
            made = torch.arange(buffer.shape[-1], dtype=buffer.dtype).expand(buffer.shape).clone()
        elif own_name in ("inv_freq", "original_inv_freq") and hasattr(owner, "compute_axial_rope_parameters"):
            made = owner.compute_axial_rope_parameters(owner.config)[0]
        else:
            raise CheckpointError(f"the vision tower has a buffer {name}, which is not known here")
        owner.register_buffer(own_name, made, persistent=False)
