"""Folders of images: one folder per class, read through an index of hashes.

Classes are the folders sorted by name, images the files below them sorted by path; a folder that
holds images and no folders is one class. The first opening decodes every file and records its
size, time and SHA-256 in ``.fpdm-index.json`` (when the folder is writable); later openings decode
what is new or changed. Whatever the index says, the bytes of each image are hashed again when it
is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fpdm.files import atomic_write, read_small
from fpdm.settings import UserError
from fpdm.shards import DataError, check_request, listed, thread_map

INDEX = ".fpdm-index.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # among the others are some that start programs
_GRAY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # EXIF's tag; what its values ask for, in pillow's words
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
    7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What is known of a file: ``mode`` is pillow's, ``problem`` is why it cannot be read or "",
    ``redrawn`` what ``_as_shown`` did; None: not known, in an index of an older version."""

    size: int
    mtime_ns: int
    sha256: str
    mode: str
    problem: str
    redrawn: str | None = None


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            "data.kind=images: pillow is not installed, expected: pip install 'fpdm[eval]'"
        ) from None
    return Image


class ImageFolder:
    """Images (B, C, s, s) float32 in [-1, 1] = pixel / 127.5 - 1 and class numbers (B,) int64.

    s = image_size. C = 1 if every file is 8-bit gray, else 3. Pictures are as a viewer shows them:
    turned as their EXIF says, what is transparent over white. ADM's crop: halve by box filter while
    the short side is at least 2 s, bicubic to short side s, centre crop. A true flip mirrors left
    and right. ``skipped`` names broken files that ``index_images(accept_broken=True)`` has agreed
    to leave out, ``ignored`` files that are none by their names; ``sha256`` are the files', and
    ``classes`` the folders in the order of their numbers.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        records, accepted, self.ignored = index_images(path)
        self.skipped = tuple(name for name in records if name in accepted)
        names = [name for name in records if name not in accepted]
        if not names:
            raise DataError(f"{path}: got no readable image, expected at least one")
        classes = sorted({_class_of(name) for name in records})
        numbers = {name: i for i, name in enumerate(classes)}
        self._folder, self._names, self.classes = path, names, classes
        self.sha256 = [records[name].sha256 for name in names]
        self._labels = torch.tensor([numbers[_class_of(name)] for name in names])
        self._mode = "L" if all(records[name].mode in _GRAY for name in names) else "RGB"
        self.shape = (1 if self._mode == "L" else 3, image_size, image_size)
        self.num_classes = len(classes)
        redrawn = {name: done for name in names if (done := records[name].redrawn)}
        # that of older versions, to which these images were as they are stored
        self.former = self._digest({})
        self.fingerprint = self._digest(redrawn)

    def _digest(self, redrawn: dict[str, str]) -> str:
        digest = hashlib.sha256(f"images {self.shape}\0".encode())
        for name, sha256 in zip(self._names, self.sha256):
            digest.update(sha256.encode() + os.fsencode(name) + b"\0")
            if name in redrawn:
                digest.update(redrawn[name].encode() + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def batch(self, indices: np.ndarray, flips: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Images ``indices`` (B,); raises DataError naming a file that changed since."""
        check_request(indices, flips, len(self))
        pixels = torch.from_numpy(
            np.stack(list(thread_map(self._pixels, [int(i) for i in indices])))
            if len(indices)
            else np.empty((0, *self.shape), np.uint8)
        )
        x = pixels.float().div_(127.5).sub_(1.0)
        if flips is not None and flips.any():
            mirrored = torch.from_numpy(flips)
            x[mirrored] = x[mirrored].flip(-1)
        return x, self._labels[torch.from_numpy(indices.astype(np.int64))]

    def _pixels(self, index: int) -> np.ndarray:
        """(C, s, s) uint8."""
        path = self._folder / self._names[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != self.sha256[index]:
            raise DataError(
                f"{path}: got other bytes than the index says (image {index}), expected its; mend "
                f"it, or have it indexed anew: python -m fpdm.data verify {self._folder}"
            )
        image = _centre_crop(_decode(data)[0].convert(self._mode), self.shape[1])
        pixels = np.asarray(image, dtype=np.uint8)
        return pixels[None] if self._mode == "L" else pixels.transpose(2, 0, 1)


def _class_of(name: str) -> str:
    return name.split("/", 1)[0] if "/" in name else ""


def _centre_crop(image, size: int):  # type: ignore[no-untyped-def]  # pillow may be absent
    resampling = _pillow().Resampling
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resampling.BOX)
    scale = size / min(image.size)
    short = (round(image.width * scale), round(image.height * scale))
    image = image.resize(short, resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _as_shown(image):  # type: ignore[no-untyped-def]
    """A decoded image as a viewer shows it, and what was done to it: "turned", "over white"."""
    module, done, turn = _pillow(), [], None
    with contextlib.suppress(Exception):  # damaged EXIF asks for nothing
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    if turn:
        image = image.transpose(getattr(module.Transpose, turn))
        done.append("turned")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getextrema()[3][0] < 255:
            paper = module.new("RGBA", layer.size, "white")
            image = module.alpha_composite(paper, layer).convert("RGB")
            done.append("over white")
    return image, ", ".join(done)


def _decode(data: bytes):  # type: ignore[no-untyped-def]
    """A decoded image as it is shown, its file's mode, and what ``_as_shown`` did; raises
    ValueError with a short reason."""
    image_module = _pillow()
    try:
        image = image_module.open(io.BytesIO(data), formats=_FORMATS)
        limit = image_module.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {limit}")
        image.load()
        mode = image.mode
        image, redrawn = _as_shown(image) if mode in _GRAY + _COLOUR else (image, "")
    except image_module.UnidentifiedImageError:
        raise ValueError(f"not {', '.join(_FORMATS)}") from None
    except Exception as error:  # decoders raise nearly anything on damaged input
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:120]) from None
    if mode not in _GRAY + _COLOUR:
        raise ValueError(f"pixel format {mode}, expected 8 bits per channel")
    return image, mode, redrawn


def _image_names(folder: Path) -> tuple[list[str], list[str]]:
    """Relative POSIX paths of the images, sorted by class and path, however the disk lists them,
    and of what else lies there: other files, and links to folders, which are not followed. What
    begins with a dot is neither."""
    if not folder.is_dir():
        raise DataError(f"data.path: got {str(folder)!r}, expected a folder of images")
    names, others = list[str](), list[str]()
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            before = len(names)
            for root, inner, files in os.walk(entry):
                inner[:] = [name for name in inner if not name.startswith(".")]
                where = Path(root).relative_to(folder).as_posix()
                others += [f"{where}/{x}" for x in inner if os.path.islink(os.path.join(root, x))]
                for file in files:
                    if not file.startswith("."):
                        (names if _is_image(file) else others).append(f"{where}/{file}")
            if len(names) == before:
                raise DataError(f"{entry}: got no images, expected {' '.join(_SUFFIXES)}")
        elif not entry.name.startswith("."):
            (names if _is_image(entry.name) else others).append(entry.name)
    loose = sorted(name for name in names if "/" not in name)
    if loose and len(loose) < len(names):
        raise DataError(f"{folder}: got images beside the class folders: {listed(loose)}")
    if not names:
        raise DataError(f"{folder}: got no images, expected {' '.join(_SUFFIXES)}")
    return sorted(names, key=lambda name: (_class_of(name), name)), sorted(others)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _examine(path: Path) -> ImageRecord:
    """Read and decode one file; every failure becomes the record's ``problem``."""
    size = mtime = 0
    digest = mode = problem = redrawn = ""
    try:
        status = path.stat()
        size, mtime = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        _, mode, redrawn = _decode(data)
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except ValueError as error:
        problem = str(error)
    return ImageRecord(size, mtime, digest, mode, problem, redrawn)


def index_images(
    folder: Path, accept_broken: bool = False, decode_all: bool = False
) -> tuple[dict[str, ImageRecord], frozenset[str], list[str]]:
    """Records of all images in order, the names of the broken ones that were accepted, and those of
    other files, which are ignored.

    ``accept_broken`` writes the agreement to skip today's broken files into the index. The index is
    a cache: damaged or absent it is built again, and a folder that cannot be written has none.
    ``decode_all`` believes none of it, and warns of files whose bytes have changed under the same
    size and time.

    Raises:
        DataError: no images, or broken ones that nobody accepted (their number, the first five).
    """
    _pillow()
    names, others = _image_names(folder)
    known, agreed = _load_index(folder)
    same = {name for name in names if _unchanged(folder / name, known.get(name))}
    fresh = [n for n in names if decode_all or n not in same or known[n].redrawn is None]
    progress = tqdm(
        thread_map(lambda name: _examine(folder / name), fresh),
        total=len(fresh),
        desc="decoding images",
        unit="img",
        disable=True if len(fresh) < 1000 else None,  # None: only on a terminal
    )
    found = dict(zip(fresh, progress))
    records = {name: found.get(name) or known[name] for name in names}
    changed = [name for name in names if name in same and not _alike(records[name], known[name])]
    if changed:
        warnings.warn(
            f"{folder}: got other bytes than the index said in {len(changed)} of {len(names)} "
            f"images: {listed(changed)}",
            stacklevel=1,
        )
    broken = [name for name in names if records[name].problem]
    accepted = frozenset(
        n for n in broken if accept_broken or (n in agreed and _alike(records[n], known.get(n)))
    )
    if fresh or accepted != agreed or len(known) != len(names):
        _save_index(folder, records, accepted)
    refused = [f"{name} ({records[name].problem})" for name in broken if name not in accepted]
    if refused:
        raise DataError(
            f"{folder}: got {len(refused)} broken of {len(names)} images: {listed(refused, 3)}; "
            f"mend them, or agree to skip them: python -m fpdm.data verify {folder} --skip-broken"
        )
    return records, accepted, others


def told_ignored(others: Sequence[str]) -> str:
    """The end of a line about a folder that holds ``others`` beside its images."""
    plural = "s" if len(others) > 1 else ""
    return f", {len(others)} other file{plural} ignored: {listed(others)}" if others else ""


def _unchanged(path: Path, record: ImageRecord | None) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    seen = (status.st_size, status.st_mtime_ns)
    return record is not None and seen == (record.size, record.mtime_ns)


def _alike(record: ImageRecord, known: ImageRecord | None) -> bool:
    """Whether ``known``, perhaps of an older version's index, is of the same bytes."""
    return known is not None and record == replace(known, redrawn=record.redrawn)


def _save_index(folder: Path, records: dict[str, ImageRecord], accepted: frozenset[str]) -> None:
    files = {name: [getattr(r, field) for field in r.__slots__] for name, r in records.items()}
    text = json.dumps({"accepted": sorted(accepted), "files": files}).encode()
    try:
        atomic_write(folder / INDEX, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    except UserError:
        return  # a cache: without it every opening decodes every file


def _load_index(folder: Path) -> tuple[dict[str, ImageRecord], frozenset[str]]:
    try:
        digest, _, text = read_small(folder / INDEX).partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != digest:
            return {}, frozenset()
        content = json.loads(text)
        records = {name: ImageRecord(*fields) for name, fields in content["files"].items()}
        return records, frozenset(content["accepted"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, frozenset()
