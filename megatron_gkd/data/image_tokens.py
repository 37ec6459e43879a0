"""The number and positions of an image's tokens, and the vision tower's input, as in the model's own processor.

A chat template writes ONE placeholder for an image. The model is fed as many as its tower gives rows:

    internvl   <img>, (tiles) x (tokens of a tile), </img>: as many tiles as fit the image's shape, up to the
               processor's max_patches (--max_image_tiles), and, if there are several, the whole image as one more
    llava      one image of a fixed size: the patches of the resized image
    smolvlm    for each tile, row by row, a token around images, that of its row and column, and (tokens of a tile),
               with a line break after each row; then the whole image, with tokens of its own
    qwen2_5_vl one for each square of 28 x 28 pixels, after the image was resized to whole squares, and to an area
               between the processor's min_pixels and max_pixels; they lie in a grid, whose rows and columns the
               decoder is told (positions.py)

Counting needs the image's size alone. The numbers come from the directory's processor files and from transformers'
image processor, the torchvision form of it where torchvision is installed, else the PIL form. The two give slightly
different pixels (1e-4 on average): trainer, teacher and sampler have to have the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megatron_gkd.config.json_file import read_json
from megatron_gkd.data.pictures import load
from megatron_gkd.errors import CheckpointError, ConfigError, DataError
from megatron_gkd.records import Picture

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_PROCESSOR_FILES: Final = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class ImageTokens:
    """The rule of one model. Equal rules give equal tokens and equal inputs of the tower."""

    family: str
    image_token_id: int
    before: tuple[int, ...]  # tokens around those of an image
    after: tuple[int, ...]
    per_tile: int  # placeholders
    max_tiles: int | None  # None: an image is one tile
    processor_json: str  # transformers' image processor
    # smolvlm: tokens of its texts, by text
    texts: tuple[tuple[str, tuple[int, ...]], ...] = field(default=(), repr=False)
    # qwen2_5_vl: pixels of the side of a placeholder's square
    square: int | None = field(default=None, repr=False)
    # where images of URLs are kept; None: they are refused (pictures.py)
    url_dir: str | None = field(default=None, repr=False, compare=False)

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Of an image of (width, height)."""
        if self.max_tiles is None:
            return 1
        options = {"crop_to_patches": True, "max_patches": self.max_tiles}
        return int(_processor(self.processor_json).get_number_of_image_patches(size[1], size[0], options))

    def grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of the placeholders of an image of (width, height); None: the model does not ask.

        Raises DataError for an image that the processor refuses.
        """
        if self.square is None:
            return None
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        limits = _processor(self.processor_json).size
        try:
            least, most = limits["shortest_edge"], limits["longest_edge"]
            height, width = smart_resize(size[1], size[0], self.square, min_pixels=least, max_pixels=most)
        except ValueError as error:
            raise DataError(f"an image of {size[0]} x {size[1]}: {error}") from None
        return height // self.square, width // self.square

    def parts(self, size: tuple[int, int]) -> tuple[list[tuple[tuple[int, ...], int]], tuple[int, ...]]:
        """(tokens, and placeholders after them) of an image of (width, height), in order, and the tokens at its end."""
        if (grid := self.grid(size)) is not None:
            return [((), grid[0] * grid[1])], ()
        if not self.texts:
            return [(self.before, self.num_tiles(size) * self.per_tile)], self.after
        texts, found = dict(self.texts), list[tuple[tuple[int, ...], int]]()
        _, rows, columns = _processor(self.processor_json).get_number_of_image_patches(size[1], size[0])
        for row in range(rows):
            for column in range(columns):
                line = texts["\n"] if row and not column else ()
                name = f"<row_{row + 1}_col_{column + 1}>"
                found.append(((*line, *self.after, *texts[name]), self.per_tile))
        found.append(((*(texts["\n\n"] if rows else ()), *self.before), self.per_tile))
        return found, self.after

    def expand(self, bare: Sequence[int], pictures: Sequence[Picture]) -> tuple[tuple[int, ...], tuple[Picture, ...]]:
        """A prompt with one placeholder per picture -> the prompt that a model is fed, and the pictures placed.

        Raises DataError where the numbers differ: the text has the placeholder itself, or the template left one out.
        """
        found = sum(token == self.image_token_id for token in bare)
        if found != len(pictures):
            raise DataError(
                f"the prompt has {len(pictures)} images and the chat template made {found} placeholders of it; its "
                "text may not have the placeholder's own name, and the template has to write one for each image"
            )
        ids: list[int] = []
        placed: list[Picture] = []
        for token in bare:
            if token != self.image_token_id:
                ids.append(token)
                continue
            picture, spans = pictures[len(placed)], []
            parts, end = self.parts(picture.size)
            for before, number in parts:
                first = len(ids) + len(before)
                ids += [*before, *[token] * number]
                spans.append((first, first + number))
            ids += end
            placed.append(replace(picture, spans=tuple(spans), grid=self.grid(picture.size)))
        return tuple(ids), tuple(placed)

    def bare(self, ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, ...]:
        """The inverse of `expand`: the prompt with one placeholder per picture."""
        found: list[int] = []
        position = 0
        for picture in pictures:
            parts, after = self.parts(picture.size)
            first, end = picture.spans[0][0] - len(parts[0][0]), picture.spans[-1][1] + len(after)
            found += [*ids[position:first], self.image_token_id]
            position = end
        return (*found, *ids[position:])

    def inputs(self, pictures: Sequence[Picture]) -> Mapping[str, torch.Tensor]:
        """What the tower is fed, tiles of all pictures one after another. Raises DataError."""
        images = [load(picture) for picture in pictures]
        options: dict[str, Any] = {}
        if self.max_tiles is not None:
            options = {"crop_to_patches": True, "max_patches": self.max_tiles}
        if self.texts:  # a list of tiles an image, with images of zeros where others have more, which the tower drops
            images = [[image] for image in images]
        found = _processor(self.processor_json)(images=images, return_tensors="pt", **options)
        names = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
        return {name: found[name] for name in names if name in found}


def read_image_tokens(
    path: str | Path, family: str, image_token_id: int, tokenizer: PreTrainedTokenizerBase, *, max_tiles: int | None
) -> ImageTokens:
    """The rule of the model in a directory.

    Args:
        family: model_type of its config.json, `image_token_id` likewise.
        max_tiles: in place of the processor's own; None: that.

    Raises CheckpointError for a directory whose processor is not understood, ConfigError for `max_tiles` that it has no
    use for.
    """
    path = Path(path)
    files = _processor_files(path)
    processor = _load_processor(path)
    described = json.dumps({"class": type(processor).__name__, **_plain(processor.to_dict())}, sort_keys=True)
    if family == "llava":
        if max_tiles is not None:
            raise ConfigError(f"--max_image_tiles: the images of {path} (llava) are one tile each; leave it out")
        side = getattr(processor, "crop_size", None) or processor.size
        patch = files.get("patch_size")
        if type(patch) is not int or patch < 1:
            raise CheckpointError(
                f"{path}: processor_config.json has no patch_size, which says how many tokens an image has"
            )
        number = (side["height"] // patch) * (side["width"] // patch) + int(
            files.get("num_additional_image_tokens") or 0
        )
        number -= files.get("vision_feature_select_strategy") == "default"
        return ImageTokens(family, image_token_id, (), (), number, None, described)
    if family == "smolvlm":
        if max_tiles is not None:
            raise ConfigError(
                f"--max_image_tiles: the tiles of {path} (smolvlm) follow from size.longest_edge in its processor's "
                "files; leave it out"
            )
        return _smolvlm(path, image_token_id, tokenizer, files, processor, described)
    if family == "qwen2_5_vl":
        if max_tiles is not None:
            raise ConfigError(
                f"--max_image_tiles: the images of {path} (qwen2_5_vl) have no tiles; min_pixels and max_pixels in its "
                "processor's files bound their tokens; leave it out"
            )
        return _qwen2_5_vl(path, image_token_id, processor, described)
    assert family == "internvl", family
    names = [getattr(tokenizer, name, None) for name in ("start_image_token", "end_image_token")]
    defaults = ("<img>", "</img>")
    found: list[Any] = [tokenizer.convert_tokens_to_ids(n or d) for n, d in zip(names, defaults, strict=True)]
    if any(token_id is None or token_id == tokenizer.unk_token_id for token_id in found):
        raise CheckpointError(f"{path}: the tokenizer has no tokens that begin and end an image (<img>, </img>)")
    per_tile = files.get("image_seq_length", 256)
    own = getattr(processor, "max_patches", None)
    if type(per_tile) is not int or per_tile < 1 or type(own) is not int:
        raise CheckpointError(f"{path}: the processor's image_seq_length or max_patches is missing, or no number")
    return ImageTokens(family, image_token_id, (found[0],), (found[1],), per_tile, max_tiles or own, described)


def _qwen2_5_vl(path: Path, image_token_id: int, processor: Any, described: str) -> ImageTokens:
    patch, merge, size = (getattr(processor, name, None) for name in ("patch_size", "merge_size", "size"))
    limits = [size[name] if size and name in size else None for name in ("shortest_edge", "longest_edge")]
    if not all(type(number) is int and number > 0 for number in (patch, merge, *limits)) or not processor.do_resize:
        raise CheckpointError(
            f"{path}: the processor's patch_size, merge_size, min_pixels or max_pixels is missing, or no number, or it "
            "does not resize (do_resize)"
        )
    assert isinstance(patch, int)
    assert isinstance(merge, int)
    return ImageTokens("qwen2_5_vl", image_token_id, (), (), 1, None, described, square=patch * merge)


def _smolvlm(
    path: Path,
    image_token_id: int,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, Any],
    processor: Any,
    described: str,
) -> ImageTokens:
    per_tile = files.get("image_seq_len")
    longest, tile = processor.size["longest_edge"], processor.max_image_size["longest_edge"]
    if type(per_tile) is not int or per_tile < 1:
        raise CheckpointError(f"{path}: the processor's image_seq_len is missing, or no number")
    if longest % tile or not processor.do_image_splitting:
        raise CheckpointError(
            f"{path}: the processor makes images of {longest} pixels of tiles of {tile} (do_image_splitting "
            f"{processor.do_image_splitting}); supported are images split into whole tiles"
        )

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    names = [getattr(tokenizer, name, None) for name in ("fake_image_token", "global_image_token")]
    around, whole = (n or d for n, d in zip(names, ("<fake_token_around_image>", "<global-img>"), strict=True))
    most = range(1, longest // tile + 1)
    texts = ["\n", "\n\n", *(f"<row_{row}_col_{column}>" for row in most for column in most)]
    marks = ids(around)
    by_text = tuple((text, ids(text)) for text in texts)
    return ImageTokens("smolvlm", image_token_id, (*marks, *ids(whole)), marks, per_tile, None, described, by_text)


def _processor_files(path: Path) -> dict[str, Any]:
    """What the processor's files say beside the image processor's settings."""
    found: dict[str, Any] = {}
    for name in _PROCESSOR_FILES[::-1]:
        if (path / name).is_file():
            try:
                found |= read_json(path / name)
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(f"{path / name} is damaged: {error}") from error
    if not found:
        raise CheckpointError(f"{path} has no {' or '.join(_PROCESSOR_FILES)}: its images cannot be prepared")
    return found


def _load_processor(path: Path) -> Any:
    from transformers import AutoImageProcessor

    loader: Any = AutoImageProcessor
    try:
        return loader.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError
        raise CheckpointError(f"{path}: its image processor cannot be loaded: {error}") from error


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without what JSON does not hold, which is no setting."""
    found = {}
    for name, value in options.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        found[name] = value
    return found


@cache
def _processor(described: str) -> Any:
    import transformers

    options = json.loads(described)
    return getattr(transformers, options.pop("class")).from_dict(options)
