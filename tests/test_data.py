"""Digits, the order of samples, the importers of latents, and the commands.

``python tests/test_data.py`` writes the digits asset again from scikit-learn.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save, save_file
from test_images import folder
from test_shards import latents, open_latents, refused, rows

from fpdm import data, shards
from fpdm.cli import run_main
from fpdm.config import DataConfig
from fpdm.data import DataError, open_dataset, stream_indices


def make_digits() -> bytes:
    """The asset, byte for byte; the split rule is in assets/README.md."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    halves: dict[str, list[int]] = {"train": [], "reference": []}
    odd = 0
    for label in range(10):
        ids = [int(i) for i in np.flatnonzero(digits.target == label)]
        ids.sort(key=lambda i: hashlib.sha256(f"fpdm digits {i}".encode()).digest())
        half = (len(ids) + (len(ids) % 2 and odd % 2 == 0)) // 2
        odd += len(ids) % 2
        halves["train"] += ids[:half]
        halves["reference"] += ids[half:]
    return save(
        {
            "images": digits.images.astype(np.uint8),
            "labels": digits.target.astype(np.uint8),
            **{name: np.array(sorted(ids), np.int16) for name, ids in halves.items()},
        }
    )


# digits


def test_digits_asset_is_scikit_learns():
    pytest.importorskip("sklearn")
    assert make_digits() == data.DIGITS.read_bytes()


def test_digits_values_and_halves():
    whole = open_dataset(DataConfig(split="all"))
    x, y = whole.batch(rows(1797))
    assert x.shape == (1797, 1, 8, 8) == (len(whole), *whole.shape)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert set(((x + 1) * 8).unique().tolist()) == set(range(17))
    halves = {}
    for split, count in (("train", 899), ("reference", 898)):
        half = open_dataset(DataConfig(split=split))
        assert len(half) == count
        halves[split] = half.batch(rows(count))
        share = halves[split][1].bincount() / y.bincount()
        assert (share - 0.5).abs().max() < 0.005, "stratified"
    together = torch.cat([halves["train"][0], halves["reference"][0]]).flatten(1)
    assert sorted(together.tolist()) == sorted(x.flatten(1).tolist()), "a partition"
    prints = {open_dataset(DataConfig(split=s)).fingerprint for s in ("train", "reference", "all")}
    assert len(prints) == 3


def test_digits_refuse_what_makes_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    digits = open_dataset(DataConfig())
    digits.batch(rows(3), np.zeros(3, bool))
    refused(lambda: digits.batch(rows(3), np.array([False, True, False])), "mirrored")
    refused(lambda: open_dataset(DataConfig(flip=True)), "data.flip", "got true")
    refused(lambda: open_dataset(DataConfig(path="x")), "data.path", "kind=digits")
    for bad in (np.array([899]), np.array([-1]), np.array([0.0]), np.array([[0]])):
        refused(lambda bad=bad: digits.batch(bad), "indices: got")
    raw = bytearray(data.DIGITS.read_bytes())
    raw[5000] ^= 1
    (tmp_path / "digits").write_bytes(raw)
    monkeypatch.setattr(data, "DIGITS", tmp_path / "digits")
    refused(lambda: open_dataset(DataConfig()), "damaged")


# order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10, 12, 13, 899, 4096, 100_003])
def test_stream_holds_each_id_once_per_epoch(n: int):
    epochs = stream_indices(n, seed=5, start=0, count=3 * n).reshape(3, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    if n > 10:
        assert not (epochs[0] == epochs[1]).all()
        assert not (epochs[0] == stream_indices(n, 6, 0, n)).all()
        assert not (epochs[0] == np.arange(n)).all()


def test_stream_is_the_same_however_it_is_cut():
    n, count = 97, 1000
    whole = stream_indices(n, 2**64 - 1, 0, count)
    generator = np.random.default_rng(0)
    for _ in range(20):
        cuts = np.sort(generator.integers(0, count + 1, 12))
        edges = [0, *(int(c) for c in cuts), count]
        parts = [stream_indices(n, 2**64 - 1, a, b - a) for a, b in itertools.pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), whole)
    world = [stream_indices(n, 2**64 - 1, r, 1)[0] for r in range(50)]
    assert world == whole[:50].tolist()


def test_stream_far_out_and_wide_needs_no_more_memory():
    far = stream_indices(1_281_167, 0, 2**62, 512)
    assert far.dtype == np.int64
    assert len(set(far.tolist())) >= 511
    wide = stream_indices(2**40 + 7, 0, 2**40 - 300_000, 600_000)
    first, second = wide[: 300_000 + 7], wide[300_000 + 7 :]
    assert len(np.unique(first)) == len(first)
    assert len(np.unique(second)) == len(second)
    assert wide.min() >= 0
    assert wide.max() < 2**40 + 7
    assert wide.max() > 2**31, "ids beyond 32 bits occur"
    assert len(stream_indices(10, 0, 5, 0)) == 0


def test_stream_refuses_impossible_requests():
    for bad in ((0, 0, 0, 1), (5, -1, 0, 1), (5, 2**64, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)):
        refused(lambda bad=bad: stream_indices(*bad), "stream: got")
    refused(lambda: stream_indices(5, 0, 2**63 - 1, 1), "stream: got")


def chi_squares(n: int, epochs: int) -> list[float]:
    """Standard scores of: id at a position, pairs of ids in one epoch, first ids of two epochs."""
    stream = stream_indices(n, 0, 0, n * epochs).reshape(epochs, n)
    position = np.stack([np.bincount(stream[:, p], minlength=n) for p in range(n)])

    def score(counts: np.ndarray, freedom: int) -> float:
        mean = counts.mean()
        return float((((counts - mean) ** 2 / mean).sum() - freedom) / np.sqrt(2 * freedom))

    scores = [score(position, (n - 1) ** 2)]
    for p, q in ((0, 1), (1, n - 1)):
        pairs = np.bincount(stream[:, p] * n + stream[:, q], minlength=n * n).reshape(n, n)
        assert not pairs.diagonal().any()
        scores.append(score(pairs[~np.eye(n, dtype=bool)], n * (n - 1) - 1))
    successive = np.bincount(stream[:-1, 0] * n + stream[1:, 0], minlength=n * n)
    return [*scores, score(successive, n * n - 1)]


@pytest.mark.parametrize("n", [3, 5, 7, 10, 16, 17, 29])
def test_stream_is_uniform(n: int):
    assert max(map(abs, chi_squares(n, 20_000))) < 5


@pytest.mark.parametrize("n", [5, 7, 10, 17])
def test_stream_uniformity_test_bites(n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "_ROUNDS", 2)
    assert max(chi_squares(n, 20_000)) > 8


# importers


def fastdit(root: Path, count: int = 23) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    features, labels = root / "imagenet256_features", root / "imagenet256_labels"
    features.mkdir()
    labels.mkdir()
    x, y = latents(count, 3), np.arange(count) % 10
    order = np.random.default_rng(0).permutation(count)
    for i in order:
        np.save(features / f"{i}.npy", x[i : i + 1])
    for i in order[::-1]:
        np.save(labels / f"{i}.npy", y[i : i + 1])
    return features, labels, x, y


def convert(features: Path, labels: Path, out: Path) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "latent_scale": 0.5, "rows_per_shard": 8}
    shards.write_shards(data.fastdit_batches(features, labels), out, **settings)


def test_fastdit_is_paired_by_number_whatever_the_listing_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    features, labels, x, y = fastdit(tmp_path)
    listdir, generator = os.listdir, np.random.default_rng(1)
    for i in range(5):
        convert(features, labels, tmp_path / f"out{i}")
        got, classes = open_latents(tmp_path / f"out{i}").batch(rows(23))
        assert np.array_equal(got.numpy(), x)
        assert np.array_equal(classes.numpy(), y)
        monkeypatch.setattr(os, "listdir", lambda p: list(generator.permutation(listdir(p))))
    naive = [int(Path(n).stem) for n in os.listdir(features)]
    assert naive != [int(Path(n).stem) for n in os.listdir(labels)], "unsorted zips would mispair"


def test_fastdit_names_what_does_not_pair(tmp_path: Path):
    features, labels, _, _ = fastdit(tmp_path)
    for i in (21, 22, 5, 9):
        (labels / f"{i}.npy").unlink()
    (features / "0.npy").unlink()
    message = refused(lambda: convert(features, labels, tmp_path / "out"))
    assert "4 features without label [5, 9, 21 and 1 more]" in message
    assert "1 labels without feature [0]" in message
    assert not (tmp_path / "out").exists()


def npy(shape: str, dtype: str = "<f4", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (os.mkdir, (str(self.path),))


def test_fastdit_refuses_damaged_and_hostile_files(tmp_path: Path):
    features, labels, _, _ = fastdit(tmp_path)
    canary = tmp_path / "canary"
    payload = io.BytesIO()
    np.save(payload, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    with_nan = io.BytesIO()
    np.save(with_nan, np.full((1, 4, 4, 4), np.nan, np.float32))
    wrong = io.BytesIO()
    np.save(wrong, np.zeros((1, 4, 4, 2), np.float32))
    target = features / "7.npy"
    whole = target.read_bytes()
    cases = {
        "pickled": payload.getvalue(),
        "pickle alone": pickle.dumps(Canary(canary)),
        "200 MB": npy("(1, 50, 1000, 1000)", body=b"\0" * 256),
        "4 TB": npy("(1, 1000000, 1000, 1000)"),
        "overflowing": npy("(65536, 65536, 65536, 65536)"),
        "negative": npy("(-1, 4, 4, 4)", body=b"\0" * 256),
        "none": npy("(0, 4, 4, 4)"),
        "nested": npy("(" * 2000 + ")" * 2000),
        "no tuple": npy("__import__('os').mkdir('canary')"),
        "unknown type": npy("(1, 4, 4, 4)", "<q9"),
        "empty": b"",
        "truncated": whole[:-1],
        "longer": whole + b"\0",
        "version": b"\x93NUMPY\x09\x00" + whole[8:],
        "nan": with_nan.getvalue(),
        "shape": wrong.getvalue(),
    }
    for name, raw in cases.items():
        target.write_bytes(raw)
        tracemalloc.start()
        refused(lambda: convert(features, labels, tmp_path / "out"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6, name
        assert not canary.exists(), name
        assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "negative control: the canary does sing when it is unpickled"
    target.write_bytes(whole)
    convert(features, labels, tmp_path / "out")


def test_fastdit_refuses_labels_that_are_none(tmp_path: Path):
    features, labels, _, _ = fastdit(tmp_path)
    for bad in (np.array([1.0]), np.array([1, 2]), np.array(1), np.array([[1]])):
        np.save(labels / "4.npy", bad)
        refused(lambda: convert(features, labels, tmp_path / "out"), "4.npy", "integers (b,)")
    np.save(labels / "4.npy", np.array([-3]))
    refused(lambda: convert(features, labels, tmp_path / "out"), "row 4", "label -3")
    np.save(labels / "4.npy", np.array([4]))
    for name in ("x.npy", "007.npy"):
        (labels / name).write_bytes((labels / "4.npy").read_bytes())
        refused(lambda: convert(features, labels, tmp_path / "out"), name)
        (labels / name).unlink()
    (labels / "4.npy").unlink()
    os.mkfifo(labels / "4.npy")
    refused(lambda: convert(features, labels, tmp_path / "out"), "4.npy", "regular")


def test_npy_reader_survives_mutated_bytes(tmp_path: Path):
    generator = np.random.default_rng(0)
    whole = io.BytesIO()
    np.save(whole, latents(1))
    path, kept = tmp_path / "0.npy", 0
    for _ in range(300):
        raw = bytearray(whole.getvalue())
        for _ in range(generator.integers(1, 4)):
            raw[generator.integers(128)] = generator.integers(256)
        path.write_bytes(raw)
        with contextlib.suppress(DataError):
            kept += data.read_npy(path).nbytes == 256
    assert kept < 300


def test_lightningdit_files(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    x, mirrored, y = latents(30), latents(30, 1), np.arange(30) % 4
    for i in range(3):
        part = slice(10 * i, 10 * i + 10)
        save_file(
            {"latents": x[part], "latents_flip": mirrored[part], "labels": y[part]},
            source / f"latents_rank00_shard{i:03d}.safetensors",
        )
    settings: dict[str, Any] = {"dtype": "float32", "latent_scale": 0.5, "rows_per_shard": 16}
    shards.write_shards(data.lightningdit_batches(source), tmp_path / "out", **settings)
    opened = open_latents(tmp_path / "out", flip=True)
    got, labels = opened.batch(rows(30), np.arange(30) % 2 == 1)
    assert np.array_equal(got[0::2].numpy(), x[0::2])
    assert np.array_equal(got[1::2].numpy(), mirrored[1::2])
    assert np.array_equal(labels.numpy(), y)
    assert opened.num_classes == 4
    # by default they are stored, and come back, as they are
    data.command(["convert-lightningdit", str(source), str(tmp_path / "own"), "--dtype", "float32"])
    own = open_dataset(DataConfig(kind="latents", path=str(tmp_path / "own")))
    assert np.array_equal(own.batch(rows(30))[0].numpy(), x)
    (source / "._latents_rank00_shard000.safetensors").write_bytes(b"x")
    assert sum(len(batch[1]) for batch in data.lightningdit_batches(source)) == 30
    bad = source / "latents_rank01_shard000.safetensors"
    for tensors in ({"latents": x}, {"latents": x, "labels": y[:-1]}):
        save_file(tensors, bad)
        refused(lambda: list(data.lightningdit_batches(source)), bad.name)
    bad.write_bytes(b"\xff" * 100)
    refused(lambda: list(data.lightningdit_batches(source)), bad.name)


# commands


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    features, labels, _, _ = fastdit(tmp_path)
    for name in (".DS_Store", "._3.npy"):
        (features / name).write_bytes(b"x")
    out = str(tmp_path / "out")
    data.command(["convert-fastdit", str(features), str(labels), out, "--rows-per-shard", "10"])
    printed = capsys.readouterr().out
    assert "23 latents (4, 4, 4) float16, 10 classes, latent_scale 0.18215" in printed
    assert "3 shards" in printed
    assert f"\ntrain      python -m fpdm.train imagenet256 --data.path {out} " in printed
    data.command(["verify", out])
    assert "all hashes match" in capsys.readouterr().out
    data.command(["latents-info", out])
    printed = capsys.readouterr().out
    x = shards.open_latents(Path(out), 0.18215, False).batch(rows(23))[0]
    assert f"{x[:, 0].mean():.4f}" in printed
    assert f"{x[:, 3].std(correction=0):.4f}" in printed
    assert "latents per class: 2 to 3" in printed
    path = folder(tmp_path)
    data.command(["verify", str(path)])
    assert "9 images decode, 0 broken skipped" in capsys.readouterr().out
    (path / "n01" / "bad.png").write_bytes(b"bad")
    refused(lambda: data.command(["verify", str(path)]), "bad.png")
    data.command(["verify", str(path), "--skip-broken"])
    assert "9 images decode, 1 broken skipped" in capsys.readouterr().out
    refused(lambda: data.command(["verify", out, "--skip-broken"]), "skip-broken")


def test_command_line_prints_one_line_and_exits_2(tmp_path: Path):
    pytest.importorskip("fpdm.cli")
    command = [sys.executable, "-m", "fpdm.data", "latents-info", str(tmp_path)]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("fpdm.data: error: ")
    assert run.stderr.count("\n") == 1


def test_no_command_is_a_mistake_that_shows_them(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        run_main("fpdm.data", data.command, [])
    assert left.value.code == 2
    told = capsys.readouterr()
    assert told.err == "fpdm.data: error: got no command, expected one of those above\n"
    for name in ("encode", "convert-fastdit", "convert-lightningdit", "verify", "latents-info"):
        assert f"\n    {name}" in told.out
    with pytest.raises(SystemExit) as left:
        run_main("fpdm.data", data.command, ["encod"])
    assert left.value.code == 2
    assert "expected one of encode, convert-fastdit" in capsys.readouterr().err


if __name__ == "__main__":
    data.DIGITS.write_bytes(make_digits())
    print(hashlib.sha256(make_digits()).hexdigest())


@pytest.mark.parametrize(
    ("kind", "words"), [("latents", "fpdm.data encode"), ("images", "per class")]
)
def test_an_absent_folder_says_what_belongs_there(kind: str, words: str) -> None:
    refused(lambda: open_dataset(DataConfig(kind=kind, path="nowhere")), "nowhere", words)  # type: ignore[arg-type]
    refused(lambda: open_dataset(DataConfig(kind=kind)), "got none", words)  # type: ignore[arg-type]
