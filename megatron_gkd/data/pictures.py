"""The images of rows: read, checked, and kept as references beside the rows' tokens.

    a file       its path and a digest of its bytes; it is read again, by the ranks that have the vision tower, when a
                 step is fed with it. Another file under the same path is an error then
    in a record  (base64, or a column of bytes) the bytes themselves, as they are encoded
    a URL        the file that it was fetched into when its row was read, under a name made of the URL. What is there is
                 not fetched again. Refused without a directory for it: a dead link would end a run

Every image is decoded once when its row is read, so that a damaged one is an error with the row's place before anything
is trained. Decoding is PIL's, into RGB, upright as its EXIF data says.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from megatron_gkd.data.image_forms import ImageSource
from megatron_gkd.errors import DataError
from megatron_gkd.records import Picture, Row

_URL_TIMEOUT_S: Final = 30.0
_URL_MOST_BYTES: Final = 64 << 20


def read_picture(source: ImageSource, folder: Path, number: int, url_dir: str | None = None) -> Picture:
    """Reads and decodes an image; it has no places in a prompt yet. Raises DataError.

    Args:
        folder: what a relative path is relative to.
        number: of the image in its record, from 0.
        url_dir: where images of URLs are kept; None: they are refused.
    """
    path = None if source.path is None else str(folder / source.path)
    if source.url is not None:
        path = _fetched(source.url, url_dir)
    name = path or f"image {number + 1} of the row"
    data = _read(path, name) if path is not None else source.data
    assert data is not None
    image = decode(data, name)
    kept = None if path is not None else data
    return Picture(name, path, kept, _digest(data), (image.width, image.height), ())


def load(picture: Picture) -> Any:
    """The image, as PIL has it. Raises DataError where it is not what it was."""
    data = picture.data
    if data is None:
        assert picture.path is not None
        data = _read(picture.path, picture.name)
        if _digest(data) != picture.digest:
            raise DataError(f"{picture.name} has changed since the rows were read; start again")
    return decode(data, picture.name)


def decode(data: bytes, name: str) -> Any:
    """RGB, upright. Raises DataError."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image that can be read (PNG, JPEG, WebP, ...)") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is a damaged image: {error}") from None


def striped_picture(width: int = 48, height: int = 32) -> Picture:
    """A picture of stripes, for checks that need one; it has no places in a prompt."""
    from PIL import Image

    file = io.BytesIO()
    stripes = bytes(
        (30 * (x % 8) + 40 * channel) % 256 for _ in range(height) for x in range(width) for channel in range(3)
    )
    Image.frombytes("RGB", (width, height), stripes).save(file, "PNG")
    data = file.getvalue()
    return Picture("the test picture", None, data, _digest(data), (width, height), ())


def reference(picture: Picture) -> str:
    """What a row of a column `images` says of it: the file's whole path, or its bytes as a data: URI."""
    if picture.path is not None:
        return str(Path(picture.path).absolute())
    assert picture.data is not None
    return f"data:image;base64,{base64.b64encode(picture.data).decode()}"


def pack(row: Row) -> bytes:
    """The pictures of a row as bytes; none for a row without pictures."""
    if not row.pictures and not row.teacher_pictures:
        return b""
    data, places = bytearray(), dict[str, tuple[int, int]]()
    for picture in (*row.pictures, *row.teacher_pictures):  # both are the same images, often
        if picture.data is not None and picture.digest not in places:
            places[picture.digest] = (len(data), len(data) + len(picture.data))
            data += picture.data

    def described(pictures: Sequence[Picture]) -> list[Any]:
        return [[p.name, p.path, places.get(p.digest) if p.path is None else None, *_facts(p)] for p in pictures]

    return json.dumps([described(row.pictures), described(row.teacher_pictures)]).encode() + b"\n" + bytes(data)


def unpack(packed: bytes) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """(the row's pictures, the teacher's own)."""
    if not packed:
        return (), ()
    head, _, data = packed.partition(b"\n")

    def read(described: list[Any]) -> tuple[Picture, ...]:
        return tuple(
            Picture(
                *(name, path, None if at is None else data[slice(*at)], digest, tuple(size)),
                tuple(map(tuple, spans)),
                tuple(grid[0]) if grid else None,
            )
            for name, path, at, digest, size, spans, *grid in described
        )

    of_row, of_teacher = json.loads(head)
    return read(of_row), read(of_teacher)


def content(row: Row) -> bytes:
    """What the pictures show and where they stand, but not where they lie: for fingerprints."""
    return repr([[_facts(p) for p in pictures] for pictures in (row.pictures, row.teacher_pictures)]).encode()


def _facts(picture: Picture) -> tuple[Any, ...]:
    grid = () if picture.grid is None else (picture.grid,)  # as it was before some models had one
    return picture.digest, picture.size, picture.spans, *grid


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _fetched(url: str, directory: str | None) -> str:
    """The file with the image of a URL, fetched if it is not there. Raises DataError."""
    if directory is None:
        raise DataError(
            f"{url[:60]} is a URL, and nothing is downloaded; store the file, or give --image_url_dir, a directory in "
            "which it is kept"
        )
    path = Path(directory).absolute() / hashlib.blake2b(url.encode(), digest_size=16).hexdigest()
    if not path.exists():
        data = _download(url)
        decode(data, url)  # what is kept is an image
        partial = path.with_name(f"{path.name}.{os.getpid()}")  # other ranks may fetch it at the same time
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            raise DataError(f"{url} cannot be kept in {directory} (--image_url_dir): {error.strerror}") from None
    return str(path)


def _download(url: str) -> bytes:
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, headers={"User-Agent": "megatron-gkd"}), timeout=_URL_TIMEOUT_S) as answer:
            data: bytes = answer.read(_URL_MOST_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(f"{url} cannot be fetched: {error}") from None
    if len(data) > _URL_MOST_BYTES:
        raise DataError(f"{url} has more than {_URL_MOST_BYTES >> 20} MiB; store a smaller file")
    return data


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
