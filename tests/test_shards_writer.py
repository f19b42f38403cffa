"""The writer of latent shards: what it refuses, and all or nothing across kills and full disks."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_shards import latents, open_latents, refused, write

from fpdm import shards


def test_writer_refuses_bad_rows_and_leaves_nothing(tmp_path: Path):
    good, y = latents(8), np.arange(8)
    holed, huge = good.copy(), good.copy()
    holed[5, 1, 1, 1] = np.nan
    huge[6] = 1e6
    cases: list[tuple[Any, ...]] = [
        ((holed, y, None), "row 13", "NaN or Inf"),
        ((huge, y, None), "row 14", "float16"),
        ((good, y, holed), "latents_flip"),
        ((good[:, :2], y, None), "row 8", "(8, 2, 4, 4)"),
        ((good, y[:7], None), "row 8", "(7,)"),
        ((good, y.astype(np.float32), None), "labels", "float32"),
        ((good, y + 3, None), "row 15", "label 10"),
        ((good, y - 1, None), "row 8", "label -1"),
        ((good.astype(np.int32), y, None), "int32"),
    ]
    settings: dict[str, Any] = {"dtype": "float16", "latent_scale": 1.0, "rows_per_shard": 4}
    out, batches = tmp_path / "out", [(good, y, None)]
    for batch, *words in cases:
        batches[1:] = [batch]
        refused(lambda: shards.write_shards(batches, out, **settings, num_classes=10), *words)
        assert not list(tmp_path.iterdir())
    refused(lambda: shards.write_shards([], tmp_path / "out", **settings), "no rows")
    (tmp_path / "out").mkdir()
    refused(lambda: shards.write_shards(batches, tmp_path / "out", **settings), "exists")
    settings["rows_per_shard"] = 0
    refused(lambda: shards.write_shards(batches, tmp_path / "new", **settings), "rows_per_shard 0")


def test_writer_syncs_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def name(fd: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"fsync {name(fd)}"), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append("rename"), rename(a, b)))
    write(tmp_path / "a", count=20)
    names = ["shard_00000.safetensors", "shard_00001.safetensors", "manifest.json", ".a.partial"]
    assert calls == [*(f"fsync {n}" for n in names), "rename", f"fsync {tmp_path.name}"]


def test_writer_on_a_full_disk_leaves_nothing(tmp_path: Path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        refused(lambda: write(tmp_path / "a"), str(tmp_path / "a"), "space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a")


@pytest.mark.parametrize(
    "failpoint", ["open:3", "mid-write:4", "before-fsync:2", "before-rename", "before-dir-fsync"]
)
def test_writer_killed_leaves_all_or_nothing(tmp_path: Path, failpoint: str):
    child = os.fork()
    if child == 0:
        os.environ["FPDM_FAILPOINT"] = failpoint
        write(tmp_path / "a")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if failpoint == "before-dir-fsync":
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    else:
        assert [p.name for p in tmp_path.iterdir()] == [".a.partial"]
        write(tmp_path / "a")  # what the kill left is used up
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
    open_latents(tmp_path / "a")
