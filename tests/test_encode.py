"""Photos to shards to a model to pictures, and an encode that is stopped wherever it is."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import signal
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint_kills import start_child, wait_child
from test_shards import latents, open_latents, refused, rows
from test_vae import save_vae

from fpdm import data, encode, figures, noise, sample, shards
from fpdm.cli import run_main
from fpdm.config import ConfigError
from fpdm.data import DataError
from fpdm.encode import cut, resume_shards
from fpdm.files import directory_lock
from fpdm.images import ImageFolder
from fpdm.pretrained import load_source
from fpdm.recipes import load_config
from fpdm.shards import LatentBatch
from fpdm.train import Trainer
from fpdm.vae import load_vae

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "latent_scale": 0.5, "rows_per_shard": 8, "num_classes": 10,
}  # fmt: skip
ORIGIN = {"seed": 0, "classes": ["a", "b"]}
COUNT = 29  # four shards, the last one short
# rows that are there after a kill: the first atomic write is that of the origin, and a shard, which
# is four writes, counts from its manifest on
FAILPOINTS = {
    "open:1": 0, "mid-write:3": 0, "before-fsync:1": 0, "atomic-write:1": 0, "atomic-write:2": 0,
    "atomic-write:3": 8, "mid-write:7": 8, "before-fsync:3": 16, "mid-write:9": 16,
    "before-rename:1": COUNT, "before-dir-fsync:1": COUNT,
}  # fmt: skip


# the writer


def rows_from(start: int) -> Iterable[LatentBatch]:
    """Batches of five, anew with every shard."""
    x, mirrored, y = latents(COUNT), latents(COUNT, 1), np.arange(COUNT) * 3 % 10
    for a, b in cut(start, COUNT, 8, 5):
        yield x[a:b], y[a:b], mirrored[a:b]


def write(out: Path, batches: Callable[[int], Iterable[LatentBatch]] = rows_from) -> int:
    """How many rows were there."""
    return resume_shards(batches, out, ORIGIN, **SETTINGS)[1]


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_parts() -> None:
    assert cut(0, 11, 4, 3) == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11)]
    assert cut(8, 11, 4, 3) == [(8, 11)]
    assert cut(11, 11, 4, 3) == []
    assert cut(0, 3, 100, 1) == [(0, 1), (1, 2), (2, 3)]


def test_it_is_what_write_shards_writes(tmp_path: Path) -> None:
    assert write(tmp_path / "a") == 0
    shards.write_shards(rows_from(0), tmp_path / "b", **SETTINGS)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.pop(shards.ORIGIN)
    assert a == b
    assert len(open_latents(tmp_path / "a", flip=True)) == COUNT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_and_continued(tmp_path: Path, failpoint: str) -> None:
    """Bit for bit what nobody stopped, and no whole shard is made twice."""
    write(tmp_path / "whole")
    out, asked = tmp_path / "out", []

    def child() -> None:
        os.environ["FPDM_FAILPOINT"] = failpoint
        write(out)

    def watched(start: int) -> Iterable[LatentBatch]:
        asked.append(start)
        return rows_from(start)

    assert wait_child(start_child(child)) == signal.SIGKILL
    assert out.exists() == (failpoint == "before-dir-fsync:1")
    there = write(out, watched)
    assert contents(out) == contents(tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert there == FAILPOINTS[failpoint]
    assert asked == ([] if failpoint == "before-dir-fsync:1" else [there])


def test_rows_of_another_start_would_show(tmp_path: Path) -> None:
    """Negative control: the comparison above sees rows that are made from the wrong one on."""
    write(tmp_path / "whole")
    begun(tmp_path)
    write(tmp_path / "out", lambda start: rows_from(start - 8))
    assert contents(tmp_path / "out") != contents(tmp_path / "whole")


def stop_at(row: int, error: BaseException) -> Callable[[int], Iterable[LatentBatch]]:
    def batches(start: int) -> Iterable[LatentBatch]:
        for x, y, mirrored in rows_from(start):
            if start >= row:
                raise error
            start += len(y)
            yield x, y, mirrored

    return batches


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("x"), OSError(28, "full")])
def test_stopped_by_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
        write(tmp_path / "out", stop_at(18, error))
    assert write(tmp_path / "out") == 16
    write(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def begun(tmp_path: Path) -> Path:
    """The partial folder of an encode that was stopped with two whole shards and a stray file."""
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", stop_at(18, KeyboardInterrupt()))
    partial = tmp_path / ".out.partial"
    (partial / "shard_00002.safetensors").write_bytes(b"half")
    return partial


def test_rows_are_counted_from_the_first_of_all(tmp_path: Path) -> None:
    """In what a continued encode refuses, too."""
    begun(tmp_path)

    def holed(start: int) -> Iterable[LatentBatch]:
        for x, y, mirrored in rows_from(start):
            yield np.where(np.arange(len(x))[:, None, None, None] == 2, np.nan, x), y, mirrored

    refused(lambda: write(tmp_path / "out", holed), "row 18: got NaN or Inf")


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(("shard", "there"), [(0, 0), (1, 8)])
def test_damaged_shards_are_made_again(tmp_path: Path, shard: int, there: int) -> None:
    write(tmp_path / "whole")
    partial = begun(tmp_path)
    flip_a_bit(partial / f"shard_{shard:05d}.safetensors")
    with pytest.warns(UserWarning, match=rf"shard_{shard:05d}.*damaged.*; made again from there"):
        assert write(tmp_path / "out") == there
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["removed", "truncated", "flipped"])
def test_a_finished_folder_that_is_damaged(tmp_path: Path, damage: str) -> None:
    """It is told, and what is told to do makes it whole."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    write(out)
    whole, shard = contents(out), out / "shard_00001.safetensors"
    if damage == "flipped":
        flip_a_bit(shard)
    else:
        os.truncate(shard, 99)
    if damage == "removed":
        shard.unlink()
    refused(lambda: write(out), str(shard), f"after mv {out} {partial} the same command makes it")
    out.rename(partial)
    with pytest.warns(UserWarning, match=r"shard_00001.*; made again from there"):
        assert write(out) == 8
    assert contents(out) == whole


def test_somebodys_folder_of_that_name(tmp_path: Path) -> None:
    """Neither an encode nor a conversion begins in it, or removes it."""
    partial = tmp_path / ".out.partial"
    (partial / "photos").mkdir(parents=True)
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"which holds notes.txt and no origin.json, expected"):
        write(tmp_path / "out")
    refused(
        lambda: shards.write_shards(rows_from(0), tmp_path / "out", **SETTINGS),
        f"{partial}: got notes.txt, photos, expected none there, where {tmp_path}/out is to be",
    )
    assert (partial / "notes.txt").read_text() == "mine"
    assert (partial / "photos").is_dir()


def test_files_beside_the_shards_stay(tmp_path: Path) -> None:
    partial = begun(tmp_path)
    (partial / "notes.txt").write_text("mine")
    write(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_damage_would_pass_without_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above."""
    write(tmp_path / "whole")
    flip_a_bit(begun(tmp_path) / "shard_00000.safetensors")
    monkeypatch.setattr(encode, "read_safetensors", lambda *args, **kwargs: {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write(tmp_path / "out") == 16
    assert contents(tmp_path / "out") != contents(tmp_path / "whole")


def test_what_is_begun_belongs_to_its_settings(tmp_path: Path) -> None:
    partial = begun(tmp_path)
    before = contents(partial)
    out = tmp_path / "out"
    for origin, changes, words in (
        (ORIGIN | {"seed": 1}, {}, f"seed: got 1, expected 0 of {partial}/origin.json"),
        (ORIGIN, {"dtype": "float16"}, "dtype: got float16, expected float32 of"),
        (ORIGIN, {"rows_per_shard": 9}, "rows_per_shard: got 9, expected 8 of"),
        ({"seed": 0}, {}, "classes: got None, expected \\['a', 'b'\\] of"),
    ):
        with pytest.raises(ConfigError, match=words):
            resume_shards(rows_from, out, origin, **(SETTINGS | changes))
    refused(lambda: shards.write_shards(rows_from(0), out, **SETTINGS), "an unfinished encode")
    with directory_lock(partial, 0.0) as state:
        assert state == "held"
        refused(lambda: write(out), "another process that writes it")
    assert contents(partial) == before, "nothing was touched"
    assert write(out) == 16
    # whole: left as it is, for the same settings alone
    assert write(out, stop_at(0, DataError("asked"))) == COUNT
    # a VAE is its weights, wherever they lie
    named, elsewhere = tmp_path / "named", ORIGIN | {"vae": {"name": "b", "sha256": "1"}}
    resume_shards(rows_from, named, ORIGIN | {"vae": {"name": "a", "sha256": "1"}}, **SETTINGS)
    assert resume_shards(rows_from, named, elsewhere, **SETTINGS)[1] == COUNT
    with pytest.raises(ConfigError, match=f"seed: got 1, expected 0 of {out}/origin.json"):
        resume_shards(rows_from, out, ORIGIN | {"seed": 1}, **SETTINGS)
    (tmp_path / "other").mkdir()
    refused(lambda: write(tmp_path / "other"), "exists")


# the command


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve coloured pictures in three class folders, of several sizes."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    generator = np.random.default_rng(0)
    for i in range(12):
        path = root / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 34), Image.Resampling.BICUBIC).save(path)
    ImageFolder(root, 16)  # its index is there
    return root


def run_encode(photos: Path, out: Path, vae: Path, *more: str) -> None:
    argv = ["encode", str(photos), str(out), "--vae", str(vae), "--image-size", "16"]
    data.command([*argv, "--rows-per-shard", "5", *more])


def test_photos_to_pictures(
    photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Encode, train with the command that was printed, sample, decode."""
    out = tmp_path / "my latents"
    run_encode(photos, out, vae)
    told = capsys.readouterr().out
    for words in (
        "12 of 3 classes, cropped to 16", "4 channels, 1/2, scaling factor 0.18215, on cpu",
        "12 made, 0 were there in", "12 latents (4, 8, 8) float16, 3 classes", "with flips, 3 shar",
    ):  # fmt: skip
        assert words in told
    command = shlex.split(told.partition("\ntrain ")[2])
    assert command[:4] == ["python", "-m", "fpdm.train", "imagenet256"]
    monkeypatch.setattr(figures, "plot_history", lambda metrics, path: False)
    monkeypatch.chdir(tmp_path)
    small = (
        "--model.hidden_size 16 --model.num_heads 2 --train.steps 2 --train.batch 4 "
        "--train.precision fp32 --train.grid_every 0 --train.grid_per_class 1 --train.device cpu "
        "--fixed_point.n_max 1 --fixed_point.m_max 1 --sample.steps 2 --sample.iters 1"
    )
    Trainer(load_config(command[3], [*command[4:], *small.split()])).run()
    capsys.readouterr()
    argv = ["runs/imagenet256", "--count", "3", "--vae", str(vae), "--device", "cpu"]
    sample.main([*argv, "--out", "pictures"])
    assert "pictures   3 made by tiny, 0 were there" in capsys.readouterr().out
    with np.load("pictures/samples.npz") as file:
        pixels = file["arr_0"]
        assert file["labels"].tolist() == [0, 1, 2]
    assert (pixels.shape, pixels.dtype) == ((3, 16, 16, 3), np.uint8)
    for i in range(3):
        with Image.open(f"pictures/{i:06d}.png") as image:
            assert np.array_equal(np.asarray(image), pixels[i])
        assert np.load(f"pictures/{i:06d}.npy").shape == (4, 8, 8)
    # the run and its export know the scale of their latents
    for source in ("runs/imagenet256", "runs/imagenet256/export"):
        assert load_source(source).latent_scale == 0.18215
        # and the names of its classes
        assert load_source(source).classes == ("class0", "class1", "class2")


def test_values_and_mirror_images(photos: Path, vae: Path, tmp_path: Path) -> None:
    """Of every photo what the VAE says by itself; mirrored is the picture, not its latents."""
    run_encode(photos, tmp_path / "out", vae, "--dtype", "float32", "--seed", "4", "--batch", "12")
    opened = open_latents(tmp_path / "out", flip=True, scale=0.18215)
    folder, loaded = ImageFolder(photos, 16), load_vae(str(vae), torch.device("cpu"))
    x, labels = folder.batch(rows(12))
    got, classes = opened.batch(rows(12))
    mirrored, _ = opened.batch(rows(12), np.ones(12, bool))
    assert torch.equal(classes, labels)
    want = loaded.encode(x, 4, folder.sha256, noise.ENCODE)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    want = loaded.encode(x.flip(-1), 4, folder.sha256, noise.ENCODE_FLIP)
    torch.testing.assert_close(mirrored, want, rtol=0, atol=1e-6)
    # control: latents that were mirrored themselves, under the same noise, are others
    wrong = loaded.encode(x, 4, folder.sha256, noise.ENCODE_FLIP).flip(-1)
    assert (wrong - mirrored).abs().max() > 0.01
    back = loaded.decode(got[:1])
    assert back.shape == (1, 3, 16, 16)


def test_the_batch_is_no_setting(photos: Path, vae: Path, tmp_path: Path) -> None:
    """The same to float32's rounding, and bit for bit with the same one."""
    words = ["--dtype", "float32", "--no-flip"]
    for name, batch in (("a", "1"), ("b", "4"), ("c", "4")):
        run_encode(photos, tmp_path / name, vae, *words, "--batch", batch)
    a, b, c = (open_latents(tmp_path / x, scale=0.18215).batch(rows(12))[0] for x in "abc")
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(b, c)
    run_encode(photos, tmp_path / "d", vae, *words, "--seed", "1")
    d = open_latents(tmp_path / "d", scale=0.18215).batch(rows(12))[0]
    assert (a - d).abs().max() > 0.01, "the comparison can fail"


def test_interrupted(
    photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SIGTERM in the second shard: one line that says how it goes on, as it does, bit for bit."""
    run_encode(photos, tmp_path / "whole", vae)
    argv = ["encode", str(photos), str(tmp_path / "out"), "--vae", str(vae), "--image-size", "16",
            "--rows-per-shard", "5", "--batch", "2"]  # fmt: skip
    batch, calls, handler = ImageFolder.batch, [], signal.getsignal(signal.SIGTERM)

    def terminated(self: ImageFolder, indices: np.ndarray) -> Any:
        calls.append(indices[0])
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, indices)

    monkeypatch.setattr(ImageFolder, "batch", terminated)
    with pytest.raises(SystemExit) as left:
        run_main("fpdm.data", data.command, argv)
    assert left.value.code == 130
    told = capsys.readouterr().err
    assert told == (
        "fpdm.data: interrupted; the same command continues behind the last whole shard\n"
    )
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    monkeypatch.setattr(
        ImageFolder, "batch", lambda self, at: calls.append(at[0]) or batch(self, at)
    )
    data.command(argv)
    assert "7 made, 5 were there" in capsys.readouterr().out
    assert [int(i) for i in calls] == [0, 2, 4, 5, 7, 5, 7, 9, 10]
    a, b = (open_latents(tmp_path / x, True, 0.18215) for x in ("whole", "out"))
    for flips in (None, np.ones(12, bool)):
        assert torch.equal(a.batch(rows(12), flips)[0], b.batch(rows(12), flips)[0])


def test_gray_photos_and_one_class(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gray").mkdir()
    for mode, name in (("L", "gray"), ("RGB", "colour")):
        (tmp_path / name).mkdir(exist_ok=True)
        out = io.BytesIO()
        Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).convert(mode).save(
            out, "PNG"
        )
        (tmp_path / name / "0.png").write_bytes(out.getvalue())
        run_encode(tmp_path / name, tmp_path / f"of {name}", vae, "--no-flip", "--dtype", "float32")
    assert "fpdm.train unconditional256 --data.path" in capsys.readouterr().out
    x, y = (open_latents(tmp_path / f"of {n}", scale=0.18215).batch(rows(1))[0]
            for n in ("gray", "colour"))  # fmt: skip
    hashes = [ImageFolder(tmp_path / n, 16).sha256 for n in ("gray", "colour")]
    assert hashes[0] != hashes[1], "other files, other noise"
    found = load_vae(str(vae), torch.device("cpu"))
    pixels = ImageFolder(tmp_path / "colour", 16).batch(rows(1))[0]
    for got, words in zip((x, y), hashes):
        want = found.encode(pixels, 0, words, noise.ENCODE)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--image-size", "15"], "image-size: got 15, expected a multiple of 2, by which tiny"),
        (["--image-size", "0"], "image-size: got 0"),
        (["--batch", "0"], "batch: got 0, expected at least 1"),
        (["--seed", "-1"], "seed: got -1, expected at least 0"),
        (["--rows-per-shard", "0"], "rows_per_shard 0"),
        (["--device", "toaster"], "device: got 'toaster'"),
        (["--vae", "nowhere"], "vae: got nowhere, expected a directory or"),
        (["--dtype", "bfloat16"], "dtype: got 'bfloat16', expected one of"),
        (["--vea", "x"], "unknown option --vea; did you mean --vae?"),
    ],
)
def test_refusals(
    argv: list[str], words: str, photos: Path, vae: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base = ["encode", str(photos), str(tmp_path / "out"), "--vae", str(vae), "--image-size", "16"]
    with pytest.raises(SystemExit) as left:
        run_main("fpdm.data", data.command, [*base, *argv])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("fpdm.data: error: ")
    assert words in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_photos_that_are_none(vae: Path, tmp_path: Path) -> None:
    refused(
        lambda: run_encode(tmp_path / "x", tmp_path / "out", vae), "expected a folder of images"
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0.png").write_bytes(b"x")
    refused(lambda: run_encode(tmp_path / "broken", tmp_path / "out", vae), "1 broken of 1 images")
