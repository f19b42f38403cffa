"""Latent shards: what goes in comes out, and every damage is named at open (C13)."""

from __future__ import annotations

import copy
import faulthandler
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fpdm import files, shards
from fpdm.config import DataConfig
from fpdm.data import open_dataset
from fpdm.shards import DataError


def refused(function: Callable[[], Any], *words: str) -> str:
    """The message of the DataError, one line that holds all words."""
    with pytest.raises(DataError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message, (word, message)
    return message


def rows(n: int) -> np.ndarray:
    return np.arange(n)


def latents(count: int, seed: int = 0, shape: tuple[int, ...] = (4, 4, 4)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def write(out: Path, count: int = 50, flip: bool = True, **changes: Any) -> tuple[np.ndarray, ...]:
    x, mirrored = latents(count), latents(count, 1)
    y = np.arange(count) * 7 % 10
    settings = {
        "dtype": "float32", "latent_scale": 0.5, "rows_per_shard": 16, "num_classes": 10, **changes
    }  # fmt: skip
    parts = [slice(0, 5), slice(5, 6), slice(6, count)]
    batches = [(x[p], y[p], mirrored[p] if flip else None) for p in parts]
    shards.write_shards(iter(batches), out, **settings)
    return x, y, mirrored


def open_latents(path: Path, flip: bool = False, scale: float = 0.5) -> shards.LatentShards:
    return open_dataset(DataConfig(kind="latents", path=str(path), flip=flip, latent_scale=scale))


def test_shards_give_back_what_was_written(tmp_path: Path):
    x, y, mirrored = write(tmp_path / "a")
    opened = open_latents(tmp_path / "a", flip=True)
    assert (len(opened), opened.shape, opened.num_classes) == (50, (4, 4, 4), 10)
    assert len(opened.manifest.shards) == 4
    picks = np.random.default_rng(0).integers(0, 50, 200)
    flips = np.random.default_rng(1).random(200) < 0.5
    got, labels = opened.batch(picks, flips)
    want = np.where(flips[:, None, None, None], mirrored[picks], x[picks])
    assert np.array_equal(got.numpy(), want)
    assert np.array_equal(labels.numpy(), y[picks])
    assert got.dtype == torch.float32
    assert opened.batch(rows(0))[0].shape == (0, 4, 4, 4)
    plain, _ = opened.batch(picks)
    assert np.array_equal(plain.numpy(), x[picks])
    doubled, _ = open_latents(tmp_path / "a", scale=1.0).batch(picks)
    assert np.array_equal(doubled.numpy(), 2 * x[picks]), "stored at 0.5, wanted at 1"
    refused(lambda: opened.batch(np.array([50])), "got 50", "< 50")
    refused(lambda: opened.batch(rows(2), np.array([1, 0])), "flips")


def test_shards_do_not_depend_on_how_batches_were_cut(tmp_path: Path):
    x, y, mirrored = write(tmp_path / "a")
    whole = [(x, y, mirrored)]
    shards.write_shards(
        whole, tmp_path / "b", dtype="float32", latent_scale=0.5, rows_per_shard=16, num_classes=10
    )
    for name in sorted(os.listdir(tmp_path / "a")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert open_latents(tmp_path / "a").fingerprint == open_latents(tmp_path / "b").fingerprint


def test_fingerprint_follows_content_and_settings(tmp_path: Path):
    write(tmp_path / "a")
    write(tmp_path / "b", num_classes=11)
    x, y, _ = write(tmp_path / "c", flip=False)
    y[0] += 1
    shards.write_shards(
        [(x, y, None)], tmp_path / "d", dtype="float32", latent_scale=0.5, rows_per_shard=16,
        num_classes=10,
    )  # fmt: skip
    prints = [open_latents(tmp_path / name).fingerprint for name in "abcd"]
    prints.append(open_latents(tmp_path / "a", scale=1.0).fingerprint)
    assert len(set(prints)) == 5


def test_half_precision_shards(tmp_path: Path):
    x, _, _ = write(tmp_path / "a", dtype="float16")
    got, _ = open_latents(tmp_path / "a").batch(rows(50))
    assert np.array_equal(got.numpy(), x.astype(np.float16).astype(np.float32))


def test_flip_without_mirrored_latents_is_refused(tmp_path: Path):
    write(tmp_path / "a", flip=False)
    refused(lambda: open_latents(tmp_path / "a", flip=True), "data.flip", "latents_flip")
    opened = open_latents(tmp_path / "a")
    refused(lambda: opened.batch(rows(2), np.array([False, True])), "flips")


# in a process of its own: one that has freed as much before would show no copy
OPENING = """
import sys
from pathlib import Path
import numpy as np
from fpdm import shards
from fpdm.config import DataConfig
from fpdm.data import open_dataset

def anonymous_mb():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

before = anonymous_mb()
opened = open_dataset(DataConfig(kind="latents", path=sys.argv[1], flip=False, latent_scale=1.0))
assert opened.batch(np.array([8191]))[0].eq(3).all()
print(anonymous_mb() - before)
copied = shards.map_tensors(Path(sys.argv[1]) / "shard_00000.safetensors")["latents"].clone()
print(anonymous_mb() - before)
"""


def test_opening_copies_nothing(tmp_path: Path):
    big = np.zeros((8192, 4, 32, 32), np.float16)
    big[-1] = 3
    batch = (big, np.zeros(8192, np.int64), None)
    settings: dict[str, Any] = {"dtype": "float16", "latent_scale": 1, "rows_per_shard": 8192}
    shards.write_shards([batch], tmp_path / "a", **settings)
    argv = [sys.executable, "-c", OPENING, str(tmp_path / "a")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    opened, copied = map(float, done.stdout.split())
    assert opened < 24, "64 MB of latents are not in private memory"
    assert copied > 48, "negative control: a copy shows"


def test_rows_past_two_gigabytes_are_addressed(tmp_path: Path):
    """A sparse file of 4.6 GB: element offsets pass 2^31 (no hash, it would read it all)."""
    count, row = 560_000, 4 * 32 * 32
    header = {
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, 8 * count]},
        "latents": {
            "dtype": "F16",
            "shape": [count, 4, 32, 32],
            "data_offsets": [8 * count, 8 * count + 2 * row * count],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(8 + len(text) + 8 * count + 2 * row * (count - 1))
        file.write(np.full(row, 5, np.float16).tobytes())
    manifest = shards.Manifest(
        (4, 32, 32), "float16", count, 1, 1.0, False, (shards.Shard("", count, 0, "", {}),)
    )
    labels = torch.zeros(count, dtype=torch.int64)
    opened = shards.LatentShards(manifest, [files.TensorFile(path)], labels, 1.0)
    x, _ = opened.batch(np.array([count - 1, count - 2]))
    assert x[0].eq(5).all()
    assert x[1].eq(0).all()


# damage to shards (C13)


def tamper(path: Path, shard: int, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change tensors of a shard and make all hashes agree again: another writer's fault."""
    manifest = shards.read_manifest(path)
    name = manifest.shards[shard].file
    tensors = load_file(path / name)
    change(tensors)
    with open(path / name, "wb") as file:
        record, _ = files.write_safetensors(
            file.write, {k: torch.from_numpy(v) for k, v in tensors.items()}
        )
    fixed = replace(
        manifest.shards[shard], size=record.size, sha256=record.sha256, crc32=record.tensors
    )
    parts = (*manifest.shards[:shard], fixed, *manifest.shards[shard + 1 :])
    (path / shards.MANIFEST).write_bytes(replace(manifest, shards=parts).to_bytes())


def test_tampering_alone_is_accepted(tmp_path: Path):
    """Negative control of the tests below: what they refuse is the change, not the rewriting."""
    write(tmp_path / "a")
    tamper(tmp_path / "a", 1, lambda tensors: None)
    open_latents(tmp_path / "a")


def test_every_flipped_bit_is_found_and_named(tmp_path: Path):
    write(tmp_path / "a")
    generator = np.random.default_rng(0)
    for path in sorted((tmp_path / "a").iterdir()):
        whole = path.read_bytes()
        for _ in range(40):
            raw = bytearray(whole)
            raw[generator.integers(len(raw))] ^= 1 << generator.integers(8)
            path.write_bytes(raw)
            refused(lambda: open_latents(tmp_path / "a"), path.name)
        path.write_bytes(whole)
    open_latents(tmp_path / "a")


def test_bit_flips_pass_without_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Negative control: with the hash check out of the way a flipped mantissa bit is not seen."""
    _, _, mirrored = write(tmp_path / "a")
    path = tmp_path / "a" / "shard_00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1
    path.write_bytes(raw)
    refused(lambda: open_latents(tmp_path / "a", flip=True), "latents_flip", "rows 32..47")
    monkeypatch.setattr(shards, "read_safetensors", lambda *args, **kwargs: {})
    got, _ = open_latents(tmp_path / "a", flip=True).batch(np.array([47]), np.array([True]))
    assert 0 < np.abs(got[0].numpy() - mirrored[47]).max() < 1e-6


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files_are_found_and_named(tmp_path: Path, keep: float):
    write(tmp_path / "a")
    for path in sorted((tmp_path / "a").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole))])
        refused(lambda: open_latents(tmp_path / "a"), path.name)
        path.write_bytes(whole)


def test_shards_that_change_while_they_are_open(tmp_path: Path):
    """One that shrinks is named; one whose name another file took is still the old one."""
    x, *_ = write(tmp_path / "a", count=64)
    opened = open_latents(tmp_path / "a")
    paths = sorted((tmp_path / "a").glob("*.safetensors"))
    (tmp_path / "other").write_bytes(bytes(paths[0].stat().st_size))
    os.replace(tmp_path / "other", paths[0])
    assert np.array_equal(opened.batch(rows(16))[0].numpy(), x[:16])
    size = paths[1].stat().st_size
    # latents are the first tensors, so that rows 16 and 17 are still there
    os.truncate(paths[1], size - 16 * 8 - 16 * 256 - 13 * 256)
    assert np.array_equal(opened.batch(np.array([16, 17]))[0].numpy(), x[16:18])
    refused(
        lambda: opened.batch(np.array([40, 31, 17, 20])),
        "shard_00001.safetensors: has shrunk since it was opened (reading 3 of rows 17..31)",
    )
    assert np.array_equal(opened.batch(np.arange(32, 64))[0].numpy(), x[32:])


def test_a_map_that_shrinks_would_end_the_process(tmp_path: Path):
    """Why shards are not mapped."""
    write(tmp_path / "a", rows_per_shard=50)
    path = tmp_path / "a" / "shard_00000.safetensors"
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        mapped = shards.map_tensors(path)["latents"]
        os.truncate(path, 4096)
        os._exit(int(mapped.sum().isfinite()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS


def test_more_shards_than_the_soft_limit_of_open_files(tmp_path: Path):
    x, *_ = write(tmp_path / "a", count=60, rows_per_shard=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 30, before[1]))
        opened = open_latents(tmp_path / "a")
        assert np.array_equal(opened.batch(rows(60))[0].numpy(), x)
        del opened
        assert len(os.listdir("/proc/self/fd")) <= held, "closed with the data set"
        # beside what is open already, such as other sets
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 30, before[1]))
        several = [open_latents(tmp_path / "a") for _ in range(12)]
        assert all(len(one) == 60 for one in several)
        del several
        # control: where the hard limit forbids it, it is told
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 30, before[1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "_allow_open_files", lambda count: None)
            refused(lambda: open_latents(tmp_path / "a"), "cannot be read: Too many open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_copies_have_files_of_their_own(tmp_path: Path):
    x, *_ = write(tmp_path / "a", count=60, rows_per_shard=20)
    opened = open_latents(tmp_path / "a")
    copies = copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))
    del opened
    # takes the descriptors that are free now
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    for one in copies:
        assert np.array_equal(one.batch(rows(60))[0].numpy(), x)
    for descriptor in others:
        os.close(descriptor)


def test_missing_and_surplus_shards(tmp_path: Path):
    write(tmp_path / "a")
    shutil.copy(tmp_path / "a/shard_00001.safetensors", tmp_path / "a/shard_00004.safetensors")
    refused(lambda: open_latents(tmp_path / "a"), "not in the manifest", "shard_00004")
    (tmp_path / "a/shard_00004.safetensors").unlink()
    open_latents(tmp_path / "a")
    (tmp_path / "a/shard_00001.safetensors").unlink()
    refused(lambda: open_latents(tmp_path / "a"), "shard_00001", "missing", "rows 16..31")
    (tmp_path / "a/shard_00002.safetensors").unlink()
    refused(lambda: open_latents(tmp_path / "a"), "shard_00001", "1 more damaged")
    (tmp_path / "a" / shards.MANIFEST).unlink()
    refused(lambda: open_latents(tmp_path / "a"), "manifest.json")
    refused(lambda: open_latents(tmp_path / "b"), "data.path")


def test_exchanged_shards_are_found(tmp_path: Path):
    write(tmp_path / "a", count=48)
    first, second = (tmp_path / "a" / f"shard_0000{i}.safetensors" for i in (0, 1))
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(whole)
    refused(lambda: open_latents(tmp_path / "a"), "shard_00000")


def set_nan(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][3, 0, 1, 1] = np.nan

    return change


FAULTS: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], list[str]]] = {
    "nan": (set_nan("latents"), ["NaN or Inf", "row 19"]),
    "nan in flips": (set_nan("latents_flip"), ["latents_flip", "NaN or Inf", "row 19"]),
    "inf": (lambda t: t["latents"].__setitem__(5, np.inf), ["NaN or Inf", "row 21"]),
    "shape": (lambda t: t.update(latents=t["latents"][:, :, :2].copy()), ["(16, 4, 2, 4)"]),
    "dtype": (lambda t: t.update(latents=t["latents"].astype(np.float16)), ["float16", "float32"]),
    "label dtype": (lambda t: t.update(labels=t["labels"].astype(np.int32)), ["labels", "int32"]),
    "fewer labels": (lambda t: t.update(labels=t["labels"][:-1].copy()), ["(15,)", "(16,)"]),
    "label 10 of 10": (lambda t: t["labels"].__setitem__(2, 10), ["label 10", "row 18", "< 10"]),
    "label -1": (lambda t: t["labels"].__setitem__(0, -1), ["label -1", "row 16"]),
    "no labels": (lambda t: t.pop("labels"), ["expected ['labels'"]),
    "surplus tensor": (lambda t: t.update(x=np.zeros(1)), ["'x'"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_behind_right_hashes_are_found_and_named(tmp_path: Path, fault: str):
    write(tmp_path / "a")
    change, words = FAULTS[fault]
    tamper(tmp_path / "a", 1, change)
    refused(lambda: open_latents(tmp_path / "a"), "shard_00001.safetensors", *words)


def change_manifest(path: Path, **changes: Any) -> None:
    manifest = shards.read_manifest(path)
    (path / shards.MANIFEST).write_bytes(replace(manifest, **changes).to_bytes())


def test_manifests_that_lie_behind_a_right_hash(tmp_path: Path):
    write(tmp_path / "a")
    good = shards.read_manifest(tmp_path / "a")
    change_manifest(tmp_path / "a")
    open_latents(tmp_path / "a")
    escape = replace(good.shards[0], file="../a/shard_00000.safetensors")
    twisted = (good.shards[1], good.shards[0], *good.shards[2:])
    lies: list[dict[str, Any]] = [
        {"shards": (escape, *good.shards[1:])},
        {"shards": twisted},
        {"shards": good.shards[:-1]},
        {"shards": ()},
        {"shards": (replace(good.shards[0], crc32=[]), *good.shards[1:])},
        {"count": 51},
        {"count": None},
        {"shape": (4, 4)},
        {"shape": (4, 4, -4)},
        {"dtype": "float64"},
        {"dtype": []},
        {"num_classes": 0},
        {"num_classes": 9},
        {"latent_scale": 0.0},
        {"latent_scale": float("nan")},
        {"flip": False},
    ]
    for lie in lies:
        (tmp_path / "a" / shards.MANIFEST).write_bytes(good.to_bytes())
        change_manifest(tmp_path / "a", **lie)
        refused(lambda: open_latents(tmp_path / "a"))
    newer = json.loads(good.to_bytes())
    newer.update(version=2, surprise=1)
    for text in (json.dumps(newer), "[]", "", "[" * 100_000, "1" * 5000, '{"format": 1}'):
        (tmp_path / "a" / shards.MANIFEST).write_text(text)
        refused(lambda: open_latents(tmp_path / "a"), "manifest.json")


def test_a_header_that_claims_four_terabytes_allocates_nothing(tmp_path: Path):
    write(tmp_path / "a")
    path = tmp_path / "a" / "shard_00000.safetensors"
    header = {"latents": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(header).encode()
    for raw in (len(text).to_bytes(8, "little") + text, (2**42).to_bytes(8, "little") + text):
        path.write_bytes(raw)
        manifest = shards.read_manifest(tmp_path / "a")
        sized = replace(
            manifest.shards[0], size=len(raw), sha256=hashlib.sha256(raw).hexdigest(), crc32={}
        )
        change_manifest(tmp_path / "a", shards=(sized, *manifest.shards[1:]))
        before = peak_mb()
        refused(lambda: open_latents(tmp_path / "a"), "shard_00000", "header damaged")
        assert peak_mb() - before < 20


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
