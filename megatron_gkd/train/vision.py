"""Vision-language students: how student and teacher see images, which parts of the tower are trained, and what is
refused.

The student's rule (data/image_tokens.py) makes the prompts. A teacher whose rule differs (another number of tiles, say)
gets its own prompt with the same completion. `prepare_towers` passes a model's rule to the chunk with its tower, so
pixels are processed only there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.pictures import striped_picture
from megatron_gkd.errors import ConfigError, NotBuiltError
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.observe.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Sight:
    """How the models of a run see images. None: a model of text alone."""

    student: ImageTokens | None = None
    teacher: ImageTokens | None = None  # of a local teacher


def read_sight(
    config: RunConfig, student: Architecture, teacher: Architecture | None, tokenizer: PreTrainedTokenizerBase
) -> Sight:
    """Read the processors' files. Raises ConfigError, NotBuiltError or CheckpointError."""
    _refuse(config, student, teacher)
    if student.vision is None:
        return Sight()
    family, token_id = student.vision.family, student.vision.image_token_id
    tiles, path = config.data.max_image_tiles, config.teacher.teacher_model
    own = read_image_tokens(config.model.model, family, token_id, tokenizer, max_tiles=tiles)
    own = replace(own, url_dir=config.data.image_url_dir)
    if teacher is None or teacher.vision is None:
        return Sight(own)
    assert path is not None
    if teacher.vision.image_token_id != token_id:
        raise ConfigError(
            f"the placeholder of an image is token {token_id} for the student and {teacher.vision.image_token_id} for "
            "the teacher: choose a teacher of the student's family"
        )
    tiles = tiles if teacher.vision.family == family else None
    return Sight(own, read_image_tokens(path, teacher.vision.family, token_id, tokenizer, max_tiles=tiles))


def prepare_towers(chunks: Sequence[HiddenStateGPTModel], images: ImageTokens | None) -> None:
    """Give the chunk with the vision tower the function that prepares pictures for it."""
    for chunk in chunks:
        if chunk.vision is not None and images is not None:
            chunk.vision.prepare = images.inputs


def freeze_towers(chunks: Sequence[HiddenStateGPTModel], *, tower: bool, projector: bool) -> None:
    """Freeze a vision tower's weights, its projector's, and those that do not affect any output."""
    for chunk in chunks:
        if chunk.vision is None:
            continue
        chunk.vision.freeze(tower=tower, projector=projector)
        unused = chunk.vision.freeze_unused(striped_picture()) if chunk.vision.prepare is not None else []
        if unused:
            logger.info("%d weights of the vision tower have no part in its rows and are kept as they are", len(unused))


def _refuse(config: RunConfig, student: Architecture, teacher: Architecture | None) -> None:
    """Raise for a teacher without vision, and for features that do not support images."""
    if student.vision is None:
        return
    is_local = isinstance(config.teacher.kind, LocalTeacher)
    if is_local and teacher is not None and teacher.vision is None:
        raise ConfigError(
            f"--model {config.model.model} sees images and --teacher_model {config.teacher.teacher_model} does not: "
            "choose a teacher with a vision tower, or a student without"
        )
    trained = not (config.model.freeze_vision and config.model.freeze_projector)
    not_built = [
        (config.lmbda.most > 0 and config.data.streaming, "--streaming true with --lmbda above 0", "leave it out"),
        (config.sampling.vllm_enable_lora, "--vllm_enable_lora true", "leave it out, and merged weights are sent"),
        (trained and config.overlap.overlap_grad_reduce, "--overlap_grad_reduce with a trained tower or projector",
         "a micro-batch without an image gives them no gradient: leave it out, or freeze both"),
        (trained and config.overlap.overlap_param_gather, "--overlap_param_gather with a trained tower or projector",
         "leave it out, or freeze both"),
    ]  # fmt: skip
    for asked, what, advice in not_built:
        if asked:
            raise NotBuiltError(f"{what} is not built for a vision-language student ({config.model.model}): {advice}")
