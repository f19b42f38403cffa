"""Kills, flips, full disks: a visible checkpoint is a whole one, and damage has a name."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpdm import checkpoint, files
from fpdm.checkpoint import CheckpointError, load, load_newest, save

Groups = dict[str, dict[str, Tensor]]
slow = pytest.mark.slow


def state(step: int, size: int = 400) -> Groups:
    """Groups whose every bit is a function of the step."""
    g = torch.Generator().manual_seed(step)
    return {
        "model": {
            "blocks.0.weight": torch.randn(size, 7, generator=g),
            "blocks.0.bias": torch.randn(size, generator=g).bfloat16(),
            "half": torch.randn(3, 5, 2, generator=g).half(),
        },
        "optimizer": {
            "count": torch.tensor(step),
            "mask": torch.rand(9, generator=g) > 0.5,
            "empty": torch.empty(0, 3),
            "double": torch.randn(size, generator=g).double(),
        },
    }


def meta(step: int) -> dict[str, object]:
    return {"step": step, "lr": step / 3, "name": "é"}


def put(root: Path, step: int, keep: int = 2, size: int = 400) -> Path:
    return save(root, step, state(step, size), meta(step), keep)


def equal(a: Groups, b: Groups) -> bool:
    return a.keys() == b.keys() and all(
        a[group].keys() == b[group].keys()
        and all(
            a[group][name].dtype == b[group][name].dtype
            and torch.equal(a[group][name], b[group][name])
            for name in a[group]
        )
        for group in a
    )


def must_hold(found: checkpoint.Checkpoint | None, step: int, size: int = 400) -> None:
    assert found is not None
    assert found.step == step
    assert found.meta == meta(step)
    assert equal(found.tensors, state(step, size))


def names(root: Path) -> list[str]:
    """Of everything there but the lock."""
    return sorted(path.name for path in root.iterdir() if path.name != files.LOCK)


def refuse_reports(line: str) -> None:
    raise AssertionError(f"unexpected report: {line}")


# round trips


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    assert load_newest(root) is None
    path = put(root, 5)
    assert path == root / "step_0000005"
    assert names(path) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    must_hold(load_newest(root, refuse_reports), 5)
    must_hold(load(path), 5)
    put(root, 6)
    put(root, 7)
    assert names(root) == ["step_0000006", "step_0000007"]
    must_hold(load_newest(root, refuse_reports), 7)


def test_format_is_safetensors_both_ways(tmp_path: Path) -> None:
    groups = state(1)
    odd = torch.randn(6, 8)[:, ::2].t()
    path = save(tmp_path, 1, groups | {"odd": {"x": odd, "scalar": torch.tensor(2.5)}}, {}, 1)
    for group, named in groups.items():
        theirs = load_file(path / f"{group}.safetensors")
        assert equal({group: theirs}, {group: named})
    assert torch.equal(load_file(path / "odd.safetensors")["x"], odd)
    save_file(groups["model"], tmp_path / "theirs.safetensors")
    ours = files.read_safetensors(tmp_path / "theirs.safetensors")
    assert equal({"m": ours}, {"m": groups["model"]})


def test_chunks_cover_large_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 1000)
    put(tmp_path, 3, size=3001)
    must_hold(load_newest(tmp_path, refuse_reports), 3, size=3001)


def test_same_step_twice(tmp_path: Path) -> None:
    first = put(tmp_path, 4)
    inode = first.stat().st_ino
    assert put(tmp_path, 4) == first
    assert first.stat().st_ino == inode
    second = save(tmp_path, 4, state(40), meta(4), 5)
    assert second.name == "step_0000004.1"
    found = load_newest(tmp_path, refuse_reports)
    assert found is not None
    assert equal(found.tensors, state(40))
    # a damaged one is not kept for its name
    flip(second / "model.safetensors", 8 * 2000)
    third = save(tmp_path, 4, state(40), meta(4), 5)
    assert third.name == "step_0000004.2"
    assert load(third).finite


def test_orphans_of_any_kind_go(tmp_path: Path) -> None:
    put(tmp_path, 1)
    for make in (Path.touch, Path.mkdir, lambda path: path.symlink_to("/")):
        make(tmp_path / ".tmp-x")
        must_hold(load_newest(tmp_path, refuse_reports), 1)
        assert names(tmp_path) == ["step_0000001"]


def test_what_cannot_be_saved_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"group name: got '\.\./x'"):
        save(tmp_path, 1, {"../x": {}}, {}, 1)
    with pytest.raises(CheckpointError, match=r"'z': got dtype torch\.complex64"):
        save(tmp_path, 1, {"m": {"z": torch.zeros(2, dtype=torch.complex64)}}, {}, 1)
    with pytest.raises(CheckpointError, match="keep=0"):
        save(tmp_path, 1, {}, {}, 0)
    assert names(tmp_path) == []


# damage


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def tensor_at(path: Path, byte: int) -> str | None:
    """The tensor whose data holds this byte of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if begin <= byte - 8 - length < end:
                return str(name)
    return None


def check_refused(root: Path, file: Path, tensor: str | None) -> None:
    lines: list[str] = []
    must_hold(load_newest(root, lines.append), 1, size=20)
    assert len(lines) == 1
    assert str(file) in lines[0]
    assert "\n" not in lines[0]
    if tensor is not None:
        assert f"tensor '{tensor}' damaged" in lines[0]


@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=slow)])
def test_every_flipped_bit_is_named(tmp_path: Path, flips: int) -> None:
    rng = random.Random(flips)
    put(tmp_path, 1, size=20)
    newest = sorted(put(tmp_path, 2, size=20).iterdir())
    in_tensors = 0
    for index in range(flips):
        file = newest[index % len(newest)]
        whole = file.read_bytes()
        bit = rng.randrange(8 * len(whole))
        tensor = tensor_at(file, bit // 8) if file.suffix == ".safetensors" else None
        in_tensors += tensor is not None
        flip(file, bit)
        check_refused(tmp_path, file, tensor)
        file.write_bytes(whole)
    assert in_tensors > flips // 10
    must_hold(load_newest(tmp_path, refuse_reports), 2, size=20)


def test_without_a_record_a_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    """The negative control: what plain safetensors readers do."""
    file = put(tmp_path, 1) / "model.safetensors"
    before = files.read_safetensors(file)
    flip(file, 8 * (file.stat().st_size - 1))
    after = files.read_safetensors(file)
    assert not equal({"m": before}, {"m": after})
    assert load_file(file).keys() == after.keys()


@pytest.mark.parametrize("cuts", [50, pytest.param(200, marks=slow)])
def test_every_truncation_is_named(tmp_path: Path, cuts: int) -> None:
    rng = random.Random(cuts)
    put(tmp_path, 1, size=20)
    newest = sorted(put(tmp_path, 2, size=20).iterdir())
    for index in range(cuts):
        file = newest[index % len(newest)]
        whole = file.read_bytes()
        length = 0 if index < len(newest) else rng.randrange(len(whole))
        file.write_bytes(whole[:length])
        check_refused(tmp_path, file, None)
        file.unlink()
        check_refused(tmp_path, file, None)
        file.write_bytes(whole)
    must_hold(load_newest(tmp_path, refuse_reports), 2, size=20)


def test_all_refused_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(put(tmp_path, step) / "model.safetensors", 8 * 3000)
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be used") as error:
        load_newest(tmp_path, lines.append)
    assert "step_0000002/model.safetensors" in str(error.value)
    assert len(lines) == 2


def reseal(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Edit a manifest and give it a right hash, as an attacker would."""
    body = json.loads((path / "manifest.json").read_bytes())
    del body["sha256"]
    change(body)
    (path / "manifest.json").write_bytes(checkpoint._sealed(body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.update(format=2), "got format 2, expected at most 1"),
        (lambda b: b["files"].update({"../../x.json": b["files"]["state.json"]}), "plain name"),
        (lambda b: b["files"].update({"a/b.json": b["files"]["state.json"]}), "plain name"),
        (lambda b: b["files"].update({"x.safetensors": 3}), "not a manifest"),
        (lambda b: b.update(files=[1]), "not a manifest"),
        (lambda b: b["files"].update({"other.json": b["files"]["state.json"]}), "missing"),
    ],
)
def test_hostile_manifests(
    tmp_path: Path,
    change: Callable[[dict], object],  # type: ignore[type-arg]
    message: str,
) -> None:
    path = put(tmp_path, 1)
    reseal(path, lambda body: None)
    assert load(path).finite
    reseal(path, change)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_fifo_does_not_hang_the_reader(tmp_path: Path) -> None:
    file = put(tmp_path, 1) / "state.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        load(file.parent)


# order, pruning, full disks


def check_order(events: list[tuple[str, str]], new: str, old: str) -> None:
    """write -> fsync of each file -> fsync of the directory -> rename -> fsync of the root -> read
    back -> prune."""

    def last(*event: str) -> int:
        return len(events) - 1 - events[::-1].index((event[0], event[1]))

    temporary = next(path for kind, path in events if kind == "rename" and path != old)
    renamed = events.index(("rename", temporary))
    written = {path for kind, path in events if kind == "write"}
    assert len(written) == 4
    for path in written:
        assert path.startswith(temporary + "/")
        assert last("write", path) < last("fsync", path) < renamed
        assert last("fsync", path) < events.index(("fsync", temporary)) < renamed
    durable = events.index(("fsync", "."))
    pruned = events.index(("rename", old))
    for name in {path.rpartition("/")[2] for path in written}:
        assert renamed < durable < events.index(("read", f"{new}/{name}")) < pruned


def test_order_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    events: list[tuple[str, str]] = []

    def relative(path: str | Path) -> str:
        return os.path.relpath(path, tmp_path)

    def of(fd: int) -> str:
        return relative(os.readlink(f"/proc/self/fd/{fd}"))

    real_open, real_write, real_fsync, real_rename = os.open, os.write, os.fsync, os.rename

    def fake_open(path: str, flags: int, mode: int = 0o777) -> int:
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            events.append(("read", relative(path)))
        return real_open(path, flags, mode)

    def fake_write(fd: int, data: memoryview) -> int:
        events.append(("write", of(fd)))
        return real_write(fd, data)

    def fake_fsync(fd: int) -> None:
        events.append(("fsync", of(fd)))
        real_fsync(fd)

    def fake_rename(source: Path, target: Path) -> None:
        events.append(("rename", relative(source)))
        real_rename(source, target)

    fakes = {"open": fake_open, "write": fake_write, "fsync": fake_fsync, "rename": fake_rename}
    for name, fake in fakes.items():
        monkeypatch.setattr(os, name, fake)
    put(tmp_path, 3)
    monkeypatch.undo()
    check_order(events, "step_0000003", "step_0000001")
    # negative controls: without one fsync, or pruning too early, the order is refused
    for missing in [event for event in events if event[0] == "fsync"]:
        with pytest.raises((AssertionError, ValueError)):
            check_order([e for e in events if e != missing], "step_0000003", "step_0000001")
    early = [("rename", "step_0000001"), *events]
    with pytest.raises(AssertionError):
        check_order(early, "step_0000003", "step_0000001")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_checkpoint_with_nan_prunes_nothing(tmp_path: Path, value: float) -> None:
    for step in (1, 2):
        put(tmp_path, step)
    for step in (3, 4, 5, 6):
        bad = state(step)
        bad["model"]["blocks.0.bias"][3] = value
        save(tmp_path, step, bad, meta(step), keep=2)
    assert {"step_0000001", "step_0000002"} <= set(names(tmp_path))
    assert len(names(tmp_path)) == 4  # of the others no more than keep
    lines: list[str] = []
    must_hold(load_newest(tmp_path, lines.append), 2)
    assert len(lines) == 2
    assert "step_0000006: holds NaN or Inf; using step_0000002" in lines[0]
    put(tmp_path, 7)  # the control: a finite one prunes
    assert "step_0000001" not in names(tmp_path)
    put(tmp_path, 8)
    assert names(tmp_path) == ["step_0000007", "step_0000008"]


def test_only_nan_is_resumed_and_said(tmp_path: Path) -> None:
    save(tmp_path, 1, {"m": {"x": torch.tensor([float("nan")])}}, {}, 1)
    lines: list[str] = []
    found = load_newest(tmp_path, lines.append)
    assert found is not None
    assert not found.finite
    assert "no finite checkpoint is left" in lines[0]


def test_one_that_was_renamed_is_passed_over(tmp_path: Path) -> None:
    """Newest by its name, and for ever: no later step would count."""
    for step in (2, 4):
        put(tmp_path, step)
    (tmp_path / "step_0000002").rename(tmp_path / "step_0000099")
    lines: list[str] = []
    must_hold(load_newest(tmp_path, lines.append), 4)
    assert lines == [
        f"refused checkpoint {tmp_path / 'step_0000099'}: got the checkpoint of step 2, expected "
        "that of its name"
    ]


def test_nan_does_not_replace_the_finite_one_of_its_step(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    bad = state(1)
    bad["model"]["half"][0] = float("nan")
    assert save(tmp_path, 1, bad, meta(1), 2) == path
    must_hold(load_newest(tmp_path, refuse_reports), 1)


def test_pruning_counts_only_what_verifies(tmp_path: Path) -> None:
    put(tmp_path, 1, keep=2)
    flip(put(tmp_path, 2, keep=2) / "optimizer.safetensors", 8 * 1500)
    put(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step_0000001", "step_0000002", "step_0000003"]
    put(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_0000003", "step_0000004"]


def test_nothing_is_pruned_unless_the_new_one_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1, keep=1)
    real = os.rename

    def lying_disk(source: Path, target: Path) -> None:
        real(source, target)
        if target.name == "step_0000002":
            flip(target / "model.safetensors", 8 * 2000)

    monkeypatch.setattr(os, "rename", lying_disk)
    with pytest.raises(CheckpointError, match=r"does not read back.*'blocks\.0\.weight'"):
        put(tmp_path, 2, keep=1)
    lines: list[str] = []
    must_hold(load_newest(tmp_path, lines.append), 1)


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    put(tmp_path, 1)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*MB free") as error:
            put(tmp_path, 2)
    assert str(tmp_path / "step_0000002") in str(error.value)
    assert names(tmp_path) == ["step_0000001"]
    must_hold(load_newest(tmp_path, refuse_reports), 1)


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/nowhere")):
        with pytest.raises(CheckpointError, match="expected a directory") as error:
            put(root, 1)
        assert str(root) in str(error.value)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_newest(tmp_path / "file")


def test_root_behind_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    put(tmp_path / "link", 1)
    must_hold(load_newest(tmp_path / "real", refuse_reports), 1)
