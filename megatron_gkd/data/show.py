"""A row as text: the prompt and the trained completion, distinguished by marks, on a terminal also by colour.

Ids are decoded only for display. Special tokens are shown as text, line breaks as line breaks, and all other control
characters as escapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.observe.text import visible
from megatron_gkd.records import Row

_DIM, _TRAINED, _SPECIAL, _OFF = "\x1b[2m", "\x1b[1;32m", "\x1b[7m", "\x1b[0m"


def show_row(encoder: ChatEncoder, row: Row, place: str, *, colours: bool, images: ImageTokens | None = None) -> str:
    """Several lines: those of the prompt (and of the teacher's, where it has its own) begin with `|`, those that are
    trained on with `>`. Of an image its name, size and tokens, and one placeholder in the prompt.
    """
    completion = row.completion_ids
    trained = "no completion: it has to be sampled" if completion is None else f"{len(completion)} trained on"
    lines = [f"{visible(place)}: {len(row.prompt_ids)} prompt tokens, {trained}"]
    for picture in row.pictures:
        (width, height), number = picture.size, picture.num_tokens
        lines.append(f"  image   | {visible(picture.name)}: {width}x{height} pixels, {number} tokens")
    prompt_ids = row.prompt_ids if images is None else images.bare(row.prompt_ids, row.pictures)
    lines += _marked(encoder, prompt_ids, "prompt  |", _DIM if colours else "")
    if row.teacher_prompt_ids is not None:
        told = row.teacher_prompt_ids
        told = told if images is None else images.bare(told, row.teacher_pictures)
        lines += _marked(encoder, told, "teacher |", _DIM if colours else "")
    if completion:
        lines += _marked(encoder, completion, "trained >", _TRAINED if colours else "")
    return "\n".join(lines)


def _marked(encoder: ChatEncoder, ids: Sequence[int], mark: str, style: str) -> list[str]:
    """Lines of text, each in its style by itself, so that a terminal that is cut off is left as it was."""
    lines = [""]
    for special, run in groupby(ids, key=encoder.special_ids.__contains__):
        begin = style + (_SPECIAL if special else "")
        for number, text in enumerate(visible(encoder.decode(list(run))).split("\n")):
            if number:
                lines.append("")
            lines[-1] += f"{begin}{text}{_OFF}" if style and text else text
    return [f"  {mark} {line}".rstrip() for line in lines]
