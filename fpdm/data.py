"""Data sets and the order in which training sees them.

    digits    1797 handwritten digits of 8 x 8, in the package      (this file)
    images    a folder of class folders                             (fpdm.images)
    latents   hashed shards, read row by row                        (fpdm.shards)

``python -m fpdm.data`` makes latents of photos (fpdm.encode), imports, checks and describes them.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from fpdm import shards
from fpdm.cli import Parser, run_main, stoppable
from fpdm.config import ConfigError, DataConfig
from fpdm.images import ImageFolder, index_images, told_ignored
from fpdm.shards import DataError, LatentBatch, check_request, listed

__all__ = ["DataError", "Dataset", "Digits", "open_dataset", "stream_indices"]

DIGITS = Path(__file__).parent / "assets" / "digits.safetensors"
_DIGITS_SHA256 = "4afc85c7930fc0114a9f0d5514db7ab0acd53712cc61ae00d698cb2fe3213f34"
_ROUNDS = 6
_FEWEST, _MOST = 64, 4096  # rows per shard of an encode, where nobody says
_FOLDERS = {
    "images": "images: a folder per class, PNG, JPEG, WEBP or BMP in it",
    "latents": "latent shards, as python -m fpdm.data encode (of photos), convert-fastdit or "
    "convert-lightningdit makes one",
}


class Dataset(Protocol):
    """What training and evaluation read; indices are 0 <= i < len."""

    shape: tuple[int, int, int]  # (C, h, w)
    num_classes: int
    fingerprint: str  # SHA-256 over content and decode settings

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, flips: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """x (B, C, h, w) float32 in [-1, 1] or scaled latents, labels (B,) int64."""


def open_dataset(config: DataConfig) -> Dataset:
    """The data set of a run, checked.

    Raises:
        DataError: the path is missing, its content is damaged, or a setting cannot be met.
    """
    if config.kind == "digits":
        if config.path:
            raise DataError(
                f"data.path: got {config.path!r} with kind=digits, expected kind=images or latents"
            )
        if config.flip:
            raise DataError("data.flip: got true, expected false: a mirrored digit is no digit")
        return Digits(config.split)
    if config.split == "reference":
        raise DataError(f"data.split: got reference, expected train for kind={config.kind}")
    path = Path(config.path)
    if not config.path or not path.is_dir():
        raise DataError(
            f"data.path: got {config.path or 'none'}, expected a folder of {_FOLDERS[config.kind]}"
        )
    if config.kind == "images":
        return ImageFolder(path, config.image_size)
    return shards.open_latents(path, config.latent_scale, config.flip)


class Digits:
    """Handwritten digits, x = pixel / 8 - 1 for pixels 0..16: (B, 1, 8, 8), labels 0..9.

    ``split``: "train" (899) and "reference" (898) are fixed halves, stratified by label; "all" is
    all 1797. Source, licence and rule of the split: assets/README.md.
    """

    def __init__(self, split: Literal["train", "reference", "all"]) -> None:
        tensors = _load_digits()
        ids = torch.arange(len(tensors["labels"])) if split == "all" else tensors[split].long()
        self.shape = (1, 8, 8)
        self.num_classes = 10
        self.fingerprint = hashlib.sha256(f"digits {_DIGITS_SHA256} {split}".encode()).hexdigest()
        self._x = tensors["images"][ids].float().div_(8.0).sub_(1.0)[:, None]
        self._labels = tensors["labels"][ids].long()

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: np.ndarray, flips: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Digits ``indices`` (B,); raises DataError for one out of range and for any true flip."""
        check_request(indices, flips, len(self))
        if flips is not None and flips.any():
            raise DataError("flips: got true, expected false: a mirrored digit is no digit")
        rows = torch.from_numpy(indices.astype(np.int64))
        return self._x[rows], self._labels[rows]


def _load_digits() -> dict[str, Tensor]:
    try:
        data = DIGITS.read_bytes()
    except OSError as error:
        raise DataError(f"{DIGITS}: cannot be read: {error.strerror}; install fpdm again") from None
    if hashlib.sha256(data).hexdigest() != _DIGITS_SHA256:
        raise DataError(f"{DIGITS}: damaged, its hash is not the published one; install fpdm again")
    return load(data)


def stream_indices(n: int, seed: int, start: int, count: int) -> np.ndarray:
    """Positions start .. start + count - 1 of the infinite stream of sample ids, (count,) int64.

    Epoch e, the positions n e .. n e + n - 1, is a permutation of 0 .. n-1 keyed by (seed, e): each
    id comes once per epoch, and any piece can be had alone, on any rank, without state, in
    O(count) time and memory. With a = ceil(sqrt n) and b = ceil(n / a), a position x = l b + r
    goes through rounds l += F(r) mod a, r += F(l) mod b (a Feistel network on a grid, hence one to
    one) until it falls below n; F is a 64-bit integer hash. Not for secrets.

    Raises:
        DataError: n < 1, start or count < 0, seed outside [0, 2^64), or a position past 2^63.
    """
    if not (1 <= n < 2**62 and 0 <= seed < 2**64 and start >= 0 and count >= 0):
        raise DataError(
            f"stream: got n={n}, seed={seed}, start={start}, count={count}; expected "
            "1 <= n < 2^62, 0 <= seed < 2^64, start and count >= 0"
        )
    if start + count >= 2**63:
        raise DataError(f"stream: got a position of {start + count}, expected less than 2^63")
    positions = np.arange(start, start + count, dtype=np.uint64)
    epoch, x = positions // np.uint64(n), positions % np.uint64(n)
    key = _mix(_mix(np.array([seed], np.uint64)) + epoch)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    x = _permute(x, key, a, b)
    outside = np.flatnonzero(x >= n)
    while len(outside):
        x[outside] = _permute(x[outside], key[outside], a, b)
        outside = outside[x[outside] >= n]
    return x.astype(np.int64)


def _permute(x: np.ndarray, key: np.ndarray, a: int, b: int) -> np.ndarray:
    """One to one on 0 .. ab-1 for each key. The hash is halved so that no sum wraps at 2^64."""
    wide, high, one = np.uint64(b), np.uint64(a), np.uint64(1)
    left, right = x // wide, x % wide
    for i in range(_ROUNDS):
        tweak = np.uint64((i * 0x9E3779B97F4A7C15) % 2**64)
        left = (left + (_mix(key + tweak + right) >> one)) % high
        right = (right + (_mix(~key + tweak + left) >> one)) % wide
    return left * wide + right


def _mix(x: np.ndarray) -> np.ndarray:
    """One to one on 64-bit words, every bit of the input reaching every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def read_npy(path: Path) -> np.ndarray:
    """Numbers from a ``.npy`` file; its header is held against the file's length before allocating.

    Raises:
        DataError: not a regular file, an object array (which would need pickle), another version or
            length than the header says.
    """
    if not path.is_file():
        raise DataError(f"{path}: missing, or not a regular file")
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            parse: dict[tuple[int, int], Callable] = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = parse[version](file)
        except Exception as error:  # numpy lets errors of its tokenizer through
            raise DataError(f"{path}: damaged .npy header ({type(error).__name__})") from None
        if dtype.kind not in "fiu":
            raise DataError(f"{path}: got dtype {dtype}, expected numbers (pickle is refused)")
        held = os.fstat(file.fileno()).st_size - file.tell()
        claimed = math.prod(shape) * dtype.itemsize
        if min(shape, default=1) < 1 or claimed != held:
            raise DataError(
                f"{path}: got {held} bytes of data, expected {claimed:.6g} for the shape "
                f"{shape!s:.60} of its header"
            )
        data = np.frombuffer(file.read(claimed), dtype=dtype)
    return data.reshape(shape, order="F" if fortran else "C")


def fastdit_batches(features: Path, labels: Path) -> Iterator[LatentBatch]:
    """Batches from fast-DiT's ``imagenet256_features/N.npy`` (b, C, h, w), b = 1 there, and
    ``imagenet256_labels/N.npy`` (b,), in the order of N as a number, paired by N.

    Raises:
        DataError: a name without its partner (the first are named), a name that is no number, or a
            damaged file.
    """
    feature_files, label_files = _numbered(features), _numbered(labels)
    unlabelled = [n for n in feature_files if n not in label_files]
    lonely = [n for n in label_files if n not in feature_files]
    if unlabelled or lonely:
        raise DataError(
            f"{features} and {labels} do not pair: got {len(unlabelled)} features without label "
            f"[{listed(unlabelled)}] and {len(lonely)} labels without feature [{listed(lonely)}]"
        )
    for number, path in tqdm(feature_files.items(), desc="converting", unit="file", disable=None):
        latents, label = read_npy(path), read_npy(label_files[number])
        if latents.ndim != 4 or label.shape != latents.shape[:1] or label.dtype.kind not in "iu":
            raise DataError(
                f"{path}: got latents {latents.shape} with labels {label.dtype} {label.shape}, "
                "expected (b, C, h, w) with integers (b,)"
            )
        if not np.isfinite(latents).all():
            raise DataError(f"{path}: got NaN or Inf, expected finite latents")
        yield latents, label, None


def _numbered(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: got no such folder, expected one with files N.npy")
    found: dict[int, Path] = {}
    for name in os.listdir(folder):
        # ._N.npy is what macOS notes about N.npy elsewhere
        if not name.endswith(".npy") or name.startswith("."):
            continue
        if not re.fullmatch(r"[0-9]{1,18}", name[:-4]):
            raise DataError(f"{folder / name}: got {name[:-4]!r}, expected a number before .npy")
        twin = found.setdefault(int(name[:-4]), folder / name)
        if twin.name != name:
            raise DataError(f"{folder}: got {twin.name} and {name}, expected each number once")
    return dict(sorted(found.items()))


def lightningdit_batches(folder: Path) -> Iterator[LatentBatch]:
    """Batches from LightningDiT's safetensors files (``latents``, ``labels`` and perhaps
    ``latents_flip``), in the order of their names. Raises DataError for a file without them."""
    files = sorted(folder.glob("[!.]*.safetensors"))
    if not files:
        raise DataError(f"{folder}: got no .safetensors files, expected some")
    for path in files:
        tensors = shards.map_tensors(path)
        if not {"latents", "labels"} <= tensors.keys():
            raise DataError(f"{path}: got {listed(sorted(tensors))}, expected latents and labels")
        rows = {name: len(tensors[name]) for name in ("latents", "labels")}
        if rows["latents"] != rows["labels"]:
            raise DataError(f"{path}: got {rows['latents']} latents and {rows['labels']} labels")
        for start in range(0, rows["labels"], 1024):
            part = {
                name: (x.float() if x.dtype == torch.bfloat16 else x)[start : start + 1024].numpy()
                for name, x in tensors.items()
                if name in ("latents", "labels", "latents_flip")
            }
            yield part["latents"], part["labels"], part.get("latents_flip")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m fpdm.data", description="Make, import and check data.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    encode = commands.add_parser("encode", help="photos to shards, by a VAE")
    encode.add_argument("photos", type=Path, help="folder of class folders of images")
    _add_output(encode, None)
    encode.add_argument(
        "--vae", required=True, metavar="DIR_OR_ID",
        help="of diffusers: a directory or a hub's OWNER/NAME, such as stabilityai/sd-vae-ft-ema",
    )  # fmt: skip
    encode.add_argument("--image-size", type=int, default=256, help="of the crop (default 256)")
    encode.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=True,
        help="also the mirror images, for --data.flip true (default)",
    )  # fmt: skip
    encode.add_argument("--batch", type=int, default=16, help="photos at once (default 16)")
    encode.add_argument("--seed", type=int, default=0, help="of the latents' noise (default 0)")
    encode.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    fastdit = commands.add_parser("convert-fastdit", help="folders of N.npy to shards")
    fastdit.add_argument("features", type=Path, help="folder of N.npy, latents (b, C, h, w)")
    fastdit.add_argument("labels", type=Path, help="folder of N.npy, labels (b,)")
    lightningdit = commands.add_parser("convert-lightningdit", help="safetensors files to shards")
    lightningdit.add_argument("folder", type=Path, help="of *.safetensors: latents and labels")
    stored = {fastdit: 0.18215, lightningdit: 1.0}  # fast-DiT's carry Stable Diffusion's factor
    for command, scale in stored.items():
        _add_output(command, 8192)
        command.add_argument("--num-classes", type=int, help="default: the largest label + 1")
        command.add_argument(
            "--latent-scale", type=float, default=scale,
            help=f"factor that the input already carries (default {scale})",
        )  # fmt: skip
    verify = commands.add_parser("verify", help="check every byte of shards, or decode every image")
    verify.add_argument("folder", type=Path, help="of shards, or of class folders of images")
    verify.add_argument(
        "--skip-broken", action="store_true", help="images: agree to leave broken files out"
    )
    info = commands.add_parser("latents-info", help="check and describe shards")
    info.add_argument("folder", type=Path, help="of shards")
    return parser


def _add_output(command: argparse.ArgumentParser, rows: int | None) -> None:
    command.add_argument("out", type=Path, help="new folder of shards, for --data.path")
    command.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16",
        help="of the stored latents (default float16)",
    )  # fmt: skip
    told = rows or f"a 256th of the photos, {_FEWEST} to {_MOST}, all that a stop can cost"
    command.add_argument(
        "--rows-per-shard", type=int, default=rows, help=f"latents per file (default {told})"
    )


def _describe(folder: Path, manifest: shards.Manifest) -> str:
    size = sum(shard.size for shard in manifest.shards)
    return (
        f"{folder}: {manifest.count} latents {manifest.shape} {manifest.dtype}, "
        f"{manifest.num_classes} classes, latent_scale {manifest.latent_scale}, "
        f"{'with' if manifest.flip else 'without'} flips, {len(manifest.shards)} shards, "
        f"{size / 1e6:.1f} MB"
    )


def _verify(folder: Path, skip_broken: bool) -> None:
    if (folder / shards.MANIFEST).is_file():
        if skip_broken:
            raise DataError("--skip-broken: got shards, expected a folder of images")
        manifest = shards.read_manifest(folder)
        shards.open_latents(folder, None, flip=False)
        print(f"{_describe(folder, manifest)}: all hashes match")
        return
    records, skipped, others = index_images(folder, accept_broken=skip_broken, decode_all=True)
    for name in sorted(skipped):
        print(f"skipped {folder / name}: {records[name].problem}")
    print(
        f"{folder}: {len(records) - len(skipped)} images decode, {len(skipped)} broken skipped"
        f"{told_ignored(others)}"
    )


def _latents_info(folder: Path) -> None:
    manifest = shards.read_manifest(folder)
    latents = shards.open_latents(folder, None, flip=False)
    total = torch.zeros(2, manifest.shape[0], dtype=torch.float64)
    classes = torch.zeros(manifest.num_classes, dtype=torch.int64)
    for start in range(0, len(latents), 1024):
        x, labels = latents.batch(np.arange(start, min(start + 1024, len(latents))))
        total += torch.stack([x.double().sum((0, 2, 3)), x.double().square().sum((0, 2, 3))])
        classes += labels.bincount(minlength=manifest.num_classes)
    mean, square = total / (len(latents) * math.prod(manifest.shape[1:]))
    std = (square - mean.square()).clamp_min(0).sqrt()
    print(_describe(folder, manifest))
    print("channel means", *(f"{x:.4f}" for x in mean), " deviations", *(f"{x:.4f}" for x in std))
    print(f"latents per class: {int(classes.min())} to {int(classes.max())}")
    print(f"fingerprint {latents.fingerprint}")


def _encode(args: argparse.Namespace) -> None:
    # for this command alone: a trainer, which imports this module too, needs no VAE
    from fpdm.encode import encoded_batches, resume_shards
    from fpdm.pretrained import choose_device
    from fpdm.vae import load_vae

    for name, least in (("batch", 1), ("seed", 0)):
        if not least <= getattr(args, name) < 2**64:
            raise ConfigError(f"{name}: got {getattr(args, name)}, expected at least {least}")
    device = choose_device(args.device)
    vae = load_vae(args.vae, device)
    vae.latent_size(args.image_size)
    images = ImageFolder(args.photos, args.image_size)
    rows = args.rows_per_shard
    if rows is None:
        rows = min(max(len(images) // 256, _FEWEST), _MOST)
    print(
        f"photos     {len(images)} of {images.num_classes} classes, cropped to {args.image_size}"
        f"{told_ignored(images.ignored)}\n"
        f"vae        {vae.name} ({vae.sha256}): {vae.channels} channels, 1/{vae.factor}, scaling "
        f"factor {vae.scale:g}, on {device}",
        flush=True,
    )
    began = time.perf_counter()
    with stoppable("the same command continues behind the last whole shard"):
        manifest, there = resume_shards(
            lambda start: encoded_batches(
                images, vae, start, seed=args.seed, flip=args.flip, batch=args.batch, rows=rows
            ),
            args.out,
            {
                "images": images.fingerprint,
                "image_size": args.image_size,
                "vae": {
                    "name": vae.name, "sha256": vae.sha256, "shift": vae.shift,
                },
                "seed": args.seed,
                "flip": args.flip,
                "classes": images.classes,
            },
            dtype=args.dtype,
            latent_scale=vae.scale,
            rows_per_shard=rows,
            num_classes=images.num_classes,
        )  # fmt: skip
    made, seconds = manifest.count - there, time.perf_counter() - began
    rate = f" in {seconds:.3g} s, {made / seconds:.3g} images/s" if made else ""
    print(f"encoded    {made} made, {there} were there{rate}")
    _tell_written(args.out, manifest)


def _tell_written(folder: Path, manifest: shards.Manifest) -> None:
    print(f"wrote      {_describe(folder, manifest)}")
    print(f"train      {train_command(folder, manifest)}")


def train_command(folder: Path, manifest: shards.Manifest) -> str:
    """What trains the paper's model on these shards."""
    recipe = "imagenet256" if manifest.num_classes > 1 else "unconditional256"
    options = {
        "data.path": shlex.quote(str(folder)),
        "data.flip": str(manifest.flip).lower(),
        "model.in_channels": manifest.shape[0],
        "model.input_size": manifest.shape[1],
        "model.num_classes": manifest.num_classes,
    }
    words = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"python -m fpdm.train {recipe} {words}"


def command(argv: list[str]) -> None:
    """``python -m fpdm.data``; raises UserError."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        raise ConfigError("got no command, expected one of those above")
    if args.command == "encode":
        _encode(args)
    elif args.command == "verify":
        _verify(args.folder, args.skip_broken)
    elif args.command == "latents-info":
        _latents_info(args.folder)
    else:
        if args.command == "convert-fastdit":
            batches = fastdit_batches(args.features, args.labels)
        else:
            batches = lightningdit_batches(args.folder)
        manifest = shards.write_shards(
            batches,
            args.out,
            dtype=args.dtype,
            latent_scale=args.latent_scale,
            rows_per_shard=args.rows_per_shard,
            num_classes=args.num_classes,
        )
        _tell_written(args.out, manifest)


def main() -> None:
    """Entry point: errors of the user become one line and exit status 2."""
    run_main("fpdm.data", command)


if __name__ == "__main__":
    main()
