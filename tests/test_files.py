"""Safetensors files from strangers, and files written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint_kills import start_child, wait_child

from fpdm import files
from fpdm.config import ConfigError, UserError
from fpdm.files import CheckpointError, atomic_write


def header(entries: object, claim: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if claim is None else claim).to_bytes(8, "little") + text + data


def entry(shape: list[object], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header({}, claim=1 << 42),
        header({}, claim=(1 << 64) - 1),
        header({"x": entry([1 << 40], 0, 1 << 42)}),
        header({"x": entry([1 << 60, 1 << 60], 0, 4)}, data=b"\0" * 4),
        header({"x": entry([-1], 0, -4)}),
        header({"x": entry([1], 0, 4), "y": entry([1], 2, 6)}, data=b"\0" * 6),
        header({"x": entry([1], 4, 8)}, data=b"\0" * 8),
        header({"x": entry([1], 0, 4)}, data=b"\0" * 5),
        header({"x": entry([True], 0, 4)}, data=b"\0" * 4),
        header({"x": entry([1], 0, 4, "F128")}, data=b"\0" * 4),
        header({"x": entry([1], 0, 4, [])}, data=b"\0" * 4),  # type: ignore[arg-type]
        header({"x": 3}),
        header([1, 2]),
        (9).to_bytes(8, "little") + b"\xff" * 9,
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_hostile_headers_are_refused_without_allocation(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError) as error:
        files.read_safetensors(tmp_path / "x")
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert time.process_time() - start < 1.0


def test_random_bytes_never_crash_the_reader(tmp_path: Path) -> None:
    rng = random.Random(7)
    file = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.ones(4, 5), "a.bias": torch.ones(5).bfloat16()}, file)
    whole = file.read_bytes()
    for _ in range(500):
        data = bytearray(whole[: rng.randrange(9, len(whole) + 1)])
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
        file.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            files.read_safetensors(file)


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, b"one")
    assert path.read_bytes() == b"one"
    atomic_write(path, lambda file: file.write(b"two"))
    assert path.read_bytes() == b"two"

    def breaks(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        atomic_write(path, breaks)
    assert path.read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin"]
    atomic_write(tmp_path / "z.npz", lambda file: np.savez(file, arr_0=np.arange(5)))
    assert np.load(tmp_path / "z.npz")["arr_0"].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"cannot write .*missing/x: No such file"):
        atomic_write(tmp_path / "missing" / "x", b"")


def test_atomic_write_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    atomic_write(path, b"old")

    def work() -> None:
        os.environ["FPDM_FAILPOINT"] = "atomic-write"
        atomic_write(path, b"a longer new one")

    assert wait_child(start_child(work)) == signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png"]


def test_atomic_write_from_two_threads(tmp_path: Path) -> None:
    path = tmp_path / "x"
    bad: list[object] = []

    def work(letter: bytes) -> None:
        try:
            for _ in range(30):
                atomic_write(path, letter * 20_000)
                if len(set(path.read_bytes())) != 1:
                    bad.append("mixed")
        except Exception as error:
            bad.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad
    assert path.stat().st_size == 20_000


@pytest.mark.parametrize(
    ("name", "words"),
    [("file/x", "expected a directory"), ("none/x", "expected a directory"), ("there", "a file")],
)
def test_a_wrong_name_is_not_called_a_full_disk(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=words) as caught:
        atomic_write(tmp_path / name, b"x")
    assert "disk space" not in str(caught.value)


def claimed(directory: Path, seed: int = 0, **more: str) -> str:
    """What a refused claim says, "" where it is none."""
    try:
        files.claim(directory, {"seed": seed}, **more)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_directory_of_other_files_is_not_claimed(tmp_path: Path) -> None:
    mine = tmp_path / "grid.png"
    mine.write_bytes(b"mine")
    assert claimed(tmp_path) == (
        f"out: got {tmp_path}, which holds grid.png and no settings.json, expected a directory "
        "that is new, empty or of these settings"
    )
    assert list(tmp_path.iterdir()) == [mine]
    assert claimed(tmp_path, written="[0-9]*.png") == ""
    assert "seed: got 1, expected 0 of" in claimed(tmp_path, 1)
    assert claimed(tmp_path / "new") == ""


def test_hidden_files_are_nobodys(tmp_path: Path) -> None:
    """What a killed claim left behind, a lock, a file manager's notes."""
    for name in (".tmp-settings.json", ".lock", ".DS_Store"):
        (tmp_path / name).touch()
    assert claimed(tmp_path) == claimed(tmp_path) == ""
    assert not (tmp_path / ".tmp-settings.json").exists()


def test_two_claims_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen a new directory: one gets it, the other is told."""
    both, opened = threading.Barrier(2, timeout=60), files._open_exclusively

    def together(path: Path) -> BinaryIO:
        both.wait()
        return opened(path)

    monkeypatch.setattr(files, "_open_exclusively", together)
    with ThreadPoolExecutor(2) as pool:
        told = sorted(pool.map(lambda seed: claimed(tmp_path, seed), range(2)))
    assert told[0] == ""
    assert told[1].startswith("seed: got ")
