"""Image folders: order, decoding, the index, and files that are no images (C15)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_shards import refused, rows

from fpdm import data, images
from fpdm.config import DataConfig
from fpdm.data import open_dataset


def picture(mode: str = "RGB", seed: int = 0, kind: str = "PNG") -> bytes:
    """40 wide, 30 high."""
    image_module = pytest.importorskip("PIL.Image")
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, *channels), np.uint8)
    out = io.BytesIO()
    image_module.fromarray(pixels, mode).save(out, kind)
    return out.getvalue()


def folder(root: Path, mode: str = "RGB", per_class: int = 3) -> Path:
    path = root / "images"
    for c, name in enumerate(("n02", "n01", "n10")):
        (path / name / "deep").mkdir(parents=True)
        for i in range(per_class):
            where = path / name / ("deep" if i == 2 else "") / f"{i}.png"
            where.write_bytes(picture(mode=mode, seed=10 * c + i))
    return path


def open_images(path: Path, size: int = 8) -> images.ImageFolder:
    return open_dataset(DataConfig(kind="images", path=str(path), image_size=size))


def test_images_are_sorted_cropped_and_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder(tmp_path)
    opened = open_images(path)
    x, y = opened.batch(rows(9))
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert opened.classes == ["n01", "n02", "n10"]
    assert opened.sha256[0] == hashlib.sha256(picture(seed=10)).hexdigest()
    assert (opened.shape, opened.num_classes, x.shape) == ((3, 8, 8), 3, (9, 3, 8, 8))
    assert x.min() >= -1
    assert x.max() <= 1
    image_module = pytest.importorskip("PIL.Image")
    first = image_module.open(io.BytesIO(picture(seed=10)))  # class n01, file 0
    small = first.resize((20, 15), image_module.BOX).resize((11, 8), image_module.BICUBIC)
    want = np.asarray(small.crop((1, 0, 9, 8))).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(x[0].numpy(), want, atol=1e-6)
    flips = np.arange(9) % 2 == 1
    mirrored, _ = opened.batch(rows(9), flips)
    assert torch.equal(mirrored[0::2], x[0::2])
    assert torch.equal(mirrored[1::2], x[1::2].flip(-1))
    walk, generator = os.walk, np.random.default_rng(0)
    monkeypatch.setattr(
        os, "walk", lambda p: [(r, d, list(generator.permutation(f))) for r, d, f in walk(p)][::-1]
    )
    (path / images.INDEX).unlink()
    again = open_images(path)
    assert again.fingerprint == opened.fingerprint
    assert torch.equal(again.batch(rows(9))[0], x)
    assert open_images(path, 16).fingerprint != opened.fingerprint


def photo(orientation: int, kind: str = "JPEG", **exif: bytes) -> bytes:
    image_module = pytest.importorskip("PIL.Image")
    tags, out = image_module.Exif(), io.BytesIO()
    tags[0x0112] = orientation
    image = image_module.open(io.BytesIO(picture()))
    image.save(out, kind, **{"exif": tags, **exif})
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photos_are_turned_as_their_exif_says(tmp_path: Path, kind: str):
    image_module, ops = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    for i in range(10):
        (tmp_path / f"{i}.{kind.lower()}").write_bytes(photo(i, kind))  # 0 and 9 mean nothing
    opened = open_images(tmp_path, 30)
    got = opened.batch(rows(10))[0]
    for i in range(10):
        with image_module.open(tmp_path / f"{i}.{kind.lower()}") as image:
            want = np.asarray(images._centre_crop(ops.exif_transpose(image).convert("RGB"), 30))
        assert np.allclose(got[i].numpy(), want.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert len({x.numpy().tobytes() for x in got}) == 8
    # control: damaged EXIF asks for nothing
    (tmp_path / "6.jpg").write_bytes(photo(6, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert open_images(tmp_path, 30).skipped == ()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_what_is_transparent_lies_over_white(tmp_path: Path, mode: str):
    """By an alpha channel, or by a colour that means it."""
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.full((8, 8), 51, np.uint8)
    pixels[:, 4:] = 204
    image, more = image_module.fromarray(pixels), {}
    if mode.endswith("A"):
        alpha = image_module.fromarray(np.where(pixels == 51, 0, 255).astype(np.uint8))
        image = image.convert(mode)
        image.putalpha(alpha)
    else:
        image = image.convert(mode)
        first = image.getpixel((0, 0))
        more = {"transparency": first}
    image.save(tmp_path / "a.png", **more)
    opened = open_images(tmp_path)
    assert opened.shape[0] == (1 if mode in ("L", "LA") else 3)
    x = opened.batch(rows(1))[0]
    assert torch.equal(x[..., :4], torch.ones_like(x[..., :4]))
    assert (x[..., 4:] - (204 / 127.5 - 1)).abs().max() < 0.02


def older_index(path: Path) -> None:
    """The index as it was before it said what is redrawn."""
    content = json.loads((path / images.INDEX).read_bytes().partition(b"\n")[2])
    content["files"] = {name: fields[:5] for name, fields in content["files"].items()}
    text = json.dumps(content).encode()
    digest = hashlib.sha256(text).hexdigest().encode()
    (path / images.INDEX).write_bytes(digest + b"\n" + text)


def fingerprint_before(path: Path) -> str:
    """Of names and bytes alone, which is what it was of when no image was redrawn."""
    digest = hashlib.sha256(b"images (3, 8, 8)\0")
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*.png") if p.name != "bad.png")
    for name in names:
        sha256 = hashlib.sha256((path / name).read_bytes()).hexdigest()
        digest.update(sha256.encode() + name.encode() + b"\0")
    return digest.hexdigest()


def test_other_folders_keep_their_fingerprint(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """Also those with opaque alpha; an older index is made new, an agreement in it stays."""
    path = folder(tmp_path)
    opaque = pytest.importorskip("PIL.Image").open(io.BytesIO(picture())).convert("RGBA")
    opaque.save(path / "n01" / "opaque.png")
    (path / "n01" / "bad.png").write_bytes(b"bad")
    images.index_images(path, accept_broken=True)
    opened = open_images(path)
    assert opened.fingerprint == opened.former == fingerprint_before(path)
    whole = (path / images.INDEX).read_bytes()
    older_index(path)
    assert open_images(path).fingerprint == opened.fingerprint
    assert (path / images.INDEX).read_bytes() == whole
    # one that is turned is new data, and an older index does not hide it
    (path / "n10" / "0.png").write_bytes(photo(6, "PNG"))
    turned = open_images(path).fingerprint
    assert open_images(path).former == fingerprint_before(path)
    older_index(path)
    assert open_images(path).fingerprint == turned != fingerprint_before(path)
    (path / "n10" / "0.png").write_bytes(photo(1, "PNG"))
    assert open_images(path).fingerprint == fingerprint_before(path)
    assert not recwarn.list


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 1), ("RGBA", 3)])
def test_channels_follow_the_files(tmp_path: Path, mode: str, channels: int):
    path = folder(tmp_path, mode)
    assert open_images(path).shape == (channels, 8, 8)
    (path / "n01" / "colour.jpg").write_bytes(picture(kind="JPEG"))
    assert open_images(path).shape == (3, 8, 8)


def test_one_flat_folder_is_one_class(tmp_path: Path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(picture(seed=i, kind="JPEG"))
    opened = open_images(tmp_path)
    assert opened.num_classes == 1
    assert opened.batch(rows(4))[1].tolist() == [0] * 4
    (tmp_path / "cats").mkdir()
    refused(lambda: open_images(tmp_path), "cats", "no images")
    (tmp_path / "cats" / "5.png").write_bytes(picture())
    refused(lambda: open_images(tmp_path), "beside the class folders", "0.jpg")


def test_what_is_no_image_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = folder(tmp_path)
    opened = open_images(path)
    assert opened.ignored == []
    (path / "n01" / "a.gif").write_bytes(b"GIF89a")
    (path / "n01" / "deep" / "b.TIFF").write_bytes(b"II*")
    (path / "n02" / "linked").symlink_to(path / "n01" / "deep")
    (path / "README.txt").write_text("x")
    for name in (".DS_Store", "n01/._0.png", "n01/.hidden.gif"):
        (path / name).write_bytes(b"x")
    again = open_images(path)
    assert again.fingerprint == opened.fingerprint
    assert again.ignored == ["README.txt", "n01/a.gif", "n01/deep/b.TIFF", "n02/linked"]
    data.command(["verify", str(path)])
    told = ", 4 other files ignored: README.txt, n01/a.gif, n01/deep/b.TIFF and 1 more\n"
    assert f"9 images decode, 0 broken skipped{told}" in capsys.readouterr().out
    assert images.told_ignored(["a.gif"]) == ", 1 other file ignored: a.gif"


def test_hidden_folders_hold_no_images(tmp_path: Path):
    path = folder(tmp_path)
    opened = open_images(path)
    for where in (".cache", "n01/.cache", "n01/deep/.cache/inner"):
        (path / where).mkdir(parents=True)
        (path / where / "thumb.png").write_bytes(picture(seed=77))
    assert open_images(path).fingerprint == opened.fingerprint
    (path / "n01" / "cache").mkdir()
    (path / "n01" / "cache" / "thumb.png").write_bytes(picture(seed=77))
    assert len(open_images(path)) == len(opened) + 1


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    )


def broken_images() -> dict[str, bytes]:
    """Thirty ways in which a file is not an image that we read."""
    png, jpeg = picture(), picture(kind="JPEG")
    corrupt = bytearray(png)
    corrupt[20] ^= 0x40  # the width in IHDR, against its CRC
    body = bytearray(png)
    body[len(png) // 2] ^= 0xFF  # compressed pixels, against the CRC and adler of IDAT
    end = chunk(b"IEND", b"")
    return {
        **{f"cut{i}.png": png[: int(len(png) * i / 100)] for i in (0, 1, 10, 30, 50, 80, 95)},
        **{f"cut{i}.jpg": jpeg[: int(len(jpeg) * i / 100)] for i in (0, 1, 10, 30, 50, 80, 95)},
        "width.png": bytes(corrupt),
        "pixels.png": bytes(body),
        "nodata.png": header(8, 8) + end,
        "zero.png": header(0, 0) + chunk(b"IDAT", zlib.compress(b"")) + end,
        "bomb.png": header(60_000, 60_000) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + end,
        "notzlib.png": header(8, 8) + chunk(b"IDAT", b"\xff" * 99) + end,
        "depth.png": header(8, 8, depth=3) + chunk(b"IDAT", zlib.compress(b"\0" * 200)) + end,
        "sixteen.png": header(8, 8, 16, 0) + chunk(b"IDAT", zlib.compress(b"\0" * 136)) + end,
        "noise.png": np.random.default_rng(0).bytes(500),
        "noise.jpg": b"\xff\xd8\xff" + np.random.default_rng(1).bytes(500),
        "nul.jpg": b"\0" * 500,
        "page.jpg": b"<html><body>404 Not Found</body></html>",
        "text.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "gif.png": b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff;",
        "ps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
        "pdf.jpg": b"%PDF-1.4\n1 0 obj\n",
        "half.webp": b"RIFF\x24\x00\x00\x00WEBPVP8 \x18\x00\x00\x00",
        "head.bmp": b"BM" + b"\0" * 20,
    }


def test_broken_images_are_listed_counted_and_skipped_on_agreement(tmp_path: Path):
    path = folder(tmp_path)
    opened = open_images(path)
    broken = broken_images()
    assert len(broken) >= 30
    for name, raw in broken.items():
        (path / "n02" / name).write_bytes(raw)
    (path / "n02" / "dangling.png").symlink_to("nowhere")
    os.mkfifo(path / "n02" / "fifo.png")
    count = len(broken) + 2
    for _ in range(2):  # the second time from the index
        words = (
            f"{count} broken of {9 + count}",
            f"{count - 3} more",
            f"verify {path} --skip-broken",
        )
        refused(lambda: open_images(path), *words)
    records, skipped, _ = images.index_images(path, accept_broken=True)
    assert {Path(name).name for name in skipped} == {*broken, "dangling.png", "fifo.png"}
    assert "pixels" in records["n02/bomb.png"].problem
    assert "8 bits" in records["n02/sixteen.png"].problem
    again = open_images(path)
    assert len(again.skipped) == count
    assert torch.equal(again.batch(rows(9))[0], opened.batch(rows(9))[0])
    assert again.num_classes == 3
    (path / "n02" / "new.png").write_bytes(b"new damage")
    refused(lambda: open_images(path), f"1 broken of {10 + count}", "new.png")
    (path / "n02" / "new.png").unlink()
    (path / "n02" / "noise.png").write_bytes(b"changed damage")
    refused(lambda: open_images(path), "1 broken", "noise.png")


def test_an_image_that_changes_later_is_named(tmp_path: Path):
    path = folder(tmp_path)
    opened = open_images(path)
    victim = path / "n01" / "1.png"
    status, whole = victim.stat(), victim.read_bytes()
    victim.write_bytes(picture(seed=99)[: len(whole)].ljust(len(whole), b"\0"))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    hidden = open_images(path)  # same size and time: the index is believed at open...
    assert hidden.fingerprint == opened.fingerprint
    refused(lambda: hidden.batch(rows(9)), "n01/1.png", "image 1")  # ...and the bytes are not
    hidden.batch(np.array([0, 2, 3]))
    victim.unlink()
    refused(lambda: hidden.batch(np.array([1])), "n01/1.png")
    victim.write_bytes(picture(seed=99))
    assert open_images(path).fingerprint != opened.fingerprint


def changed_in_place(path: Path, raw: bytes) -> None:
    """Other bytes under the same size and time."""
    status = path.stat()
    assert len(raw) == status.st_size
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flipped_bit(tmp_path: Path, kind: str) -> Path:
    """A folder of ten images whose index is of one byte that is another now, of n01/9."""
    path = folder(tmp_path)
    victim = path / "n01" / f"9.{kind.lower()}"
    victim.write_bytes(picture(kind=kind))
    open_images(path)
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    changed_in_place(victim, bytes(raw))
    return path


def test_verify_decodes_what_the_index_calls_good(tmp_path: Path):
    path = flipped_bit(tmp_path, "PNG")
    # whoever reads it later names the way out
    words = ("n01/9.png: got other bytes", f"python -m fpdm.data verify {path}")
    refused(lambda: open_images(path).batch(rows(10)), *words)
    with pytest.warns(UserWarning, match="in 1 of 10 images: n01/9.png"):
        refused(lambda: data.command(["verify", str(path)]), "1 broken of 10 images: n01/9.png")
    refused(lambda: open_images(path), "1 broken of 10 images")  # by the index, which knows it now


def test_verify_takes_changed_pictures_as_they_are(tmp_path: Path):
    """A BMP has no sums: it is told, and indexed anew."""
    path = flipped_bit(tmp_path, "BMP")
    before = open_images(path)
    refused(lambda: before.batch(rows(10)), "n01/9.bmp")
    with pytest.warns(UserWarning, match="in 1 of 10 images: n01/9.bmp"):
        data.command(["verify", str(path)])
    after = open_images(path)
    assert after.fingerprint != before.fingerprint
    after.batch(rows(10))


def test_a_damaged_index_is_built_again(tmp_path: Path):
    path = folder(tmp_path)
    opened = open_images(path)
    index = path / images.INDEX
    whole = index.read_bytes()
    for raw in (b"", whole[:-1], whole[:99] + b"f" + whole[100:], b"[" * 99_999, b"x\n{}"):
        index.write_bytes(raw)
        again = open_images(path)
        again.batch(rows(9))
        assert again.fingerprint == opened.fingerprint
        assert index.read_bytes() == whole


def test_image_settings_and_missing_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder(tmp_path)
    refused(lambda: open_images(tmp_path / "none"), "data.path")
    refused(lambda: open_images(path / "n01" / "deep" / "2.png"), "data.path")
    config = DataConfig(kind="images", path=str(path), split="reference")
    refused(lambda: open_dataset(config), "data.split")
    (tmp_path / "empty").mkdir()
    refused(lambda: open_images(tmp_path / "empty"), "no images")
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(lambda: open_images(path), "pillow", "pip install 'fpdm[eval]'")
