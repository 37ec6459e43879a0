"""Images in a rehearsal (rehearsal.py): every sample has the same number of images of one size, at the beginning of its
prompt. A tower's inputs have the shapes that the model's own processor produces, and no values.

    sight = RehearsedSight(config, (student, teacher), Shown(1, (640, 480)))    # before tensors are fake
    with FakeTensorMode(...), sight.fake_towers(): ...

The processor's own work on pixels is not counted, because it is on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.pictures import striped_picture
from megatron_gkd.errors import ConfigError
from megatron_gkd.model import vision
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.vision_config import meta_model
from megatron_gkd.records import Picture, Sample
from megatron_gkd.train.tower_flops import tower_flops
from megatron_gkd.train.vision import read_sight


@dataclass(frozen=True)
class Shown:
    """The images of every sample."""

    number: int
    size: tuple[int, int]  # width, height


class RehearsedSight:
    """How the models of a rehearsal see images."""

    def __init__(self, config: RunConfig, archs: tuple[Architecture, Architecture | None], shown: Shown) -> None:
        """Reads the processors' files. Raises the errors of `train` (train/vision.py)."""
        self.sight = read_sight(config, *archs, load_tokenizer(config.model.model))
        self._pictures = [striped_picture(*shown.size)] * shown.number
        self._shown, self._archs = shown, archs

    @property
    def flops(self) -> tuple[float, float]:
        """Matrix products for the images of a sample: in the student's tower, and in the teacher's."""
        student, teacher = self._archs
        return self._flops(student, self.sight.student), self._flops(teacher, self.sight.teacher)

    def _flops(self, arch: Architecture | None, images: ImageTokens | None) -> float:
        if arch is None or arch.vision is None or images is None or not self._pictures:
            return 0.0
        _, placed = self._expanded(images)
        return tower_flops(arch.vision, images.inputs(placed[:1]), placed[0].num_tokens) * len(placed)

    def samples(self, lengths: Sequence[tuple[int, int]]) -> tuple[Sample, ...]:
        """The samples of a step with these (prompt, completion) tokens; image tokens count as prompt. Raises
        ConfigError."""
        own, theirs = self.sight.student, self.sight.teacher
        samples = []
        for index, (prompt, completion) in enumerate(lengths):
            ids, placed = self._expanded(own)
            rest = prompt - len(ids)
            if rest < (not ids):
                raise ConfigError(
                    f"{self._shown.number} images of {self._shown.size[0]} x {self._shown.size[1]} have {len(ids)} "
                    f"tokens, and a prompt {prompt}: give --prompt_tokens (or --max_length), fewer "
                    "--images_per_sample, or --max_image_tiles"
                )
            sample = Sample(index, index, (*ids, *(0,) * rest), (0,) * completion, "dataset", None, pictures=placed)
            if theirs is not None and theirs != own:
                of_teacher, placed = self._expanded(theirs)
                prompt_ids = (*of_teacher, *(0,) * rest)
                sample = Sample(
                    *(index, index, sample.prompt_ids, sample.completion_ids, "dataset"),
                    pictures=sample.pictures,
                    teacher_prompt_ids=prompt_ids,
                    teacher_pictures=placed,
                )
            samples.append(sample)
        return tuple(samples)

    def prepare(self, chunks: Sequence[HiddenStateGPTModel], images: ImageTokens | None) -> None:
        """Give the chunk with the tower inputs without values (train/vision.py, `prepare_towers`)."""
        for chunk in chunks:
            if chunk.vision is not None and images is not None:
                grids: list[list[int]] = []
                chunk.vision.prepare = self._feed(images, grids)
                if images.square is not None:
                    chunk.vision.ask_instead(_KnownGrids(chunk.vision.visual, grids))
                elif images.texts:
                    chunk.vision.ask_instead(_FullTiles(chunk.vision.vision_model, chunk.vision.connector))

    @contextmanager
    def fake_towers(self) -> Iterator[None]:
        """Make towers of fake tensors. They are made on the meta device, which FakeTensorMode does not cover."""
        describe = meta_model

        def described(*args: Any) -> Any:
            with unset_fake_temporarily():
                model = describe(*args)
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
            return model

        with patch.object(vision, "meta_model", described):
            yield

    def _expanded(self, images: ImageTokens | None) -> tuple[tuple[int, ...], tuple[Picture, ...]]:
        if images is None:
            return (), ()
        return images.expand((images.image_token_id,) * len(self._pictures), self._pictures)

    def _feed(self, images: ImageTokens, grids: list[list[int]]) -> vision.Prepare:
        """`grids` is set to those of the last prepared images, if the processor returns any."""
        shapes: dict[tuple[int, int], dict[str, tuple[torch.Size, torch.dtype]]] = {}
        grid_of: dict[tuple[int, int], list[list[int]]] = {}
        with unset_fake_temporarily():
            for picture in (striped_picture(), *self._pictures[:1]):
                found = images.inputs([picture])
                shapes[picture.size] = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
                grid_of[picture.size] = found["image_grid_thw"].tolist() if "image_grid_thw" in found else []

        def feed(pictures: Sequence[Picture]) -> Mapping[str, torch.Tensor]:
            grids[:] = [grid for picture in pictures for grid in grid_of[picture.size]]
            fed = {}
            for name, (shape, dtype) in shapes[pictures[0].size].items():
                tiles = sum(shapes[picture.size][name][0][0] for picture in pictures)
                fed[name] = torch.empty(tiles, *shape[1:], dtype=dtype)
            return fed

        return feed


class _KnownGrids:
    """Replaces transformers' Qwen2.5-VL, whose tower reads values of the grid tensor, which fake tensors do not have.
    What depends on them is computed from real grids and passed on."""

    def __init__(self, tower: Any, grids: list[list[int]]) -> None:
        self._tower, self._grids = tower, grids

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, return_dict: bool) -> Any:
        from transformers import vision_utils

        config = self._tower.config
        merge, options = config.spatial_merge_size, dict(window_size=config.window_size, patch_size=config.patch_size)
        with unset_fake_temporarily():
            grids = torch.tensor(self._grids)
            position_ids = vision_utils.get_vision_position_ids(grids, merge)
            index, windows = vision_utils.get_vision_window_index(grids, spatial_merge_size=merge, **options)
            borders = vision_utils.get_vision_cu_seqlens(grids)
        return self._tower(
            pixel_values,
            grid_thw=image_grid_thw,
            position_ids=position_ids,
            window_index=index,
            cu_seqlens=borders.numpy(),  # of an array `.tolist()` is known
            cu_window_seqlens=windows.numpy(),
            return_dict=return_dict,
        )


class _FullTiles:
    """Replaces transformers' SmolVLM, which looks at values for empty tiles and for the used part of each tile. Here no
    tile is empty and all are used in full, as the processor makes tiles of equal images."""

    def __init__(self, tower: Any, projector: Any) -> None:
        self._tower, self._projector = tower, projector

    def get_image_features(self, pixel_values: torch.Tensor, return_dict: bool, **_: torch.Tensor) -> Any:
        embeddings = self._tower.embeddings
        patches = embeddings.patch_embedding(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2)
        places = torch.arange(patches.shape[1]).repeat(len(patches), 1)
        placed = patches + embeddings.position_embedding(places)
        encoded = self._tower.encoder(inputs_embeds=placed).last_hidden_state
        return SimpleNamespace(pooler_output=self._projector(self._tower.post_layernorm(encoded)))
