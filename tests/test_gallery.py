"""Pictures of a sampler's latents: now or later, from what is stored, each whole or not at all.

What the directory holds otherwise is in test_sample.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, read_png
from test_checkpoint_kills import start_child, wait_child
from test_sample import MODEL, SETTINGS, complain, export, npz, pngs
from test_vae import save_vae

from fpdm import checkpoint, gallery, pretrained
from fpdm.cli import run_main
from fpdm.config import Config, DataConfig, ModelConfig, to_dict
from fpdm.engine import Sampler
from fpdm.sample import main
from fpdm.vae import VAE, load_vae

pytestmark = pytest.mark.usefixtures("one_thread")
LATENTS = replace(MODEL, in_channels=4)
COUNT = 7


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("source") / "tiny", LATENTS)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture
def argv(source: Path, tmp_path: Path) -> list[str]:
    return [str(source), "--count", str(COUNT), "--out", str(tmp_path / "out")]


def decoded(out: Path, vae: Path, scale: float = 0.18215) -> np.ndarray:
    """What diffusers says of the stored latents, in the evaluators' rounding."""
    latents = torch.stack([torch.from_numpy(np.load(p)) for p in sorted(out.glob("0*.npy"))])
    with torch.no_grad():
        x = load_vae(str(vae), torch.device("cpu")).module.decode(latents / scale).sample
    return (127.5 * x.permute(0, 2, 3, 1) + 128).clamp(0, 255).to(torch.uint8).numpy()


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_pictures_later(
    argv: list[str], vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing is drawn again; the latents stay as they were."""
    out = tmp_path / "out"
    main(argv)
    latents = npz(out)
    assert latents["arr_0"].shape == (COUNT, 4, 4, 4)
    before = {p: p.stat().st_mtime_ns for p in out.glob("0*.npy")}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", lambda *args, **kwargs: pytest.fail("drawn again"))
        main([*argv, "--vae", str(vae), "--vae-batch", "3"])
    told = capsys.readouterr().out
    assert f"images     0 made, {COUNT} were there" in told
    assert f"pictures   {COUNT} made by tiny, 0 were there, " in told
    assert f"samples.npz and {COUNT} images" in told
    assert {p: p.stat().st_mtime_ns for p in out.glob("0*.npy")} == before
    found = npz(out)
    assert (found["arr_0"].shape, found["arr_0"].dtype) == ((COUNT, 8, 8, 3), np.uint8)
    assert found["labels"].tolist() == latents["labels"].tolist()
    assert apart(found["arr_0"], decoded(out, vae)) <= 1
    for i, name in enumerate(pngs(out)):
        assert np.array_equal(read_png(out / name), found["arr_0"][i])
    assert read_png(out / "grid.png").shape[2] == 3
    # control: pictures of latents without their scale are others
    assert apart(found["arr_0"], decoded(out, vae, 1.0)) > 10
    # the command once more makes nothing, and makes what is damaged
    (out / "000003.png").write_bytes((out / "000002.png").read_bytes()[:-9])
    main([*argv, "--vae", str(vae)])
    assert f"pictures   1 made by tiny, {COUNT - 1} were there, " in capsys.readouterr().out
    assert apart(npz(out)["arr_0"], found["arr_0"]) <= 1


def test_at_once_in_shards_and_bit_for_bit(
    source: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any batch, any shard: to one step of 255, and with --invariant not even that."""
    argv = [str(source), "--count", str(COUNT), "--vae", str(vae)]
    for name, more in (("one", ["--vae-batch", "1"]), ("all", ["--vae-batch", "16"])):
        main([*argv, *more, "--batch", "1", "--out", str(tmp_path / name)])
    one, whole = npz(tmp_path / "one"), npz(tmp_path / "all")
    assert apart(one["arr_0"], whole["arr_0"]) <= 1
    assert apart(one["arr_0"], whole["arr_0"][::-1]) > 10, "the comparison can fail"
    decode, sizes = VAE.decode, []

    def watched(self: VAE, latents: torch.Tensor, scale: float) -> torch.Tensor:
        sizes.append(len(latents))
        return decode(self, latents, scale)

    monkeypatch.setattr(VAE, "decode", watched)
    for name, more in (("a", ["--vae-batch", "2"]), ("b", ["--vae-batch", "5", "--batch", "2"])):
        for i in range(1 + (name == "b")):
            shard = f"{i}/2" if name == "b" else "0/1"
            main([*argv, *more, "--invariant", "--shard", shard, "--out", str(tmp_path / name)])
    assert sizes == [1] * 2 * COUNT, "rounding seldom shows in 8 bits"
    assert len(pngs(tmp_path / "a")) == COUNT
    for name in [*pngs(tmp_path / "a"), "samples.npz", "grid.png"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_directory_has_one_vae(
    argv: list[str], vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    main([*argv, "--vae", str(vae)])
    whole = (out / "samples.npz").read_bytes()
    # before anything is drawn
    latents = (out / "000000.npy").read_bytes()
    (out / "000000.npy").unlink()
    monkeypatch.setattr(Sampler, "sample", lambda *args, **kwargs: pytest.fail("drawn"))
    other = save_vae(tmp_path / "other", seed=1)
    told = complain([*argv, "--vae", str(other)], capsys)
    assert "vae.sha256: got " in told
    assert f" of {out}/vae.json, or another output directory" in told
    # the same one elsewhere
    moved = shutil.copytree(vae, tmp_path / "moved")
    (out / "000000.png").unlink()
    (out / "000000.npy").write_bytes(latents)
    main([*argv, "--vae", str(moved)])
    told = complain(argv, capsys)
    assert f"vae: got none, expected the one of {out}/vae.json, or another output" in told
    assert (out / "samples.npz").read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"latent_channels": 8}, [], "of 8 channels, expected the model's 4"),
        ({}, ["--vae-batch", "0"], "vae-batch: got 0, expected at least 1"),
        (None, ["--vae", "nowhere"], "vae: got nowhere, expected a directory"),
    ],
)
def test_refusals(
    changes: dict[str, Any] | None, more: list[str], words: str, argv: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [] if changes is None else ["--vae", str(save_vae(tmp_path / "vae", **changes))]
    assert words in complain([*argv, *given, *more], capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_of_pixels_needs_none(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export(tmp_path / "pixels")
    told = complain([str(path), "--vae", str(vae), "--out", str(tmp_path / "out")], capsys)
    assert "expected none: this model draws pictures itself" in told


def test_the_scale_is_the_runs(vae: Path, tmp_path: Path) -> None:
    """A run of latents times 0.5 draws such ones, whatever the VAE's scaling factor is."""
    groups: dict[str, Any] = {"model": random_model(LATENTS).state_dict()}
    groups["ema"] = {name: p.detach() for name, p in random_model(LATENTS).named_parameters()}
    out = tmp_path / "out"
    for kind, scale in (("latents", 0.5), ("images", 0.18215)):
        data = DataConfig(kind=kind, path="x", latent_scale=0.5, image_size=4)  # type: ignore[arg-type]
        config = Config(model=LATENTS, data=data, sample=SETTINGS)
        run = tmp_path / kind
        checkpoint.save(run / "checkpoints", 1, groups, {"config": to_dict(config)}, keep=1)
        main([str(run), "--count", "2", "--out", str(out / kind), "--vae", str(vae)])
        assert json.loads((out / kind / "vae.json").read_text())["scale"] == scale
        assert apart(npz(out / kind)["arr_0"], decoded(out / kind, vae, scale)) <= 1
    assert pretrained.load_source().latent_scale is None


@pytest.mark.parametrize("occurrence", [1, 2, 5, COUNT + 2])
def test_killed_while_decoding(occurrence: int, argv: list[str], vae: Path, tmp_path: Path) -> None:
    """vae.json, seven pictures, samples.npz: killed just before the n-th of them appears."""
    out = tmp_path / "out"
    main(argv)
    argv += ["--vae", str(vae), "--vae-batch", "2"]

    def child() -> None:
        os.environ["FPDM_FAILPOINT"] = f"atomic-write:{occurrence}"
        main(argv)

    assert wait_child(start_child(child)) == signal.SIGKILL
    there = {name: (out / name).stat().st_mtime_ns for name in pngs(out)}
    store = gallery.Store(
        out, ModelConfig(**to_dict(LATENTS) | {"in_channels": 3, "input_size": 8})
    )
    assert len(there) == max(0, occurrence - 2)
    assert all(store.read(int(name[:6])) is not None for name in there)
    assert npz(out)["arr_0"].dtype == np.float32, "still those of the latents"
    main(argv)
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    assert apart(npz(out)["arr_0"], decoded(out, vae)) <= 1


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, how: Callable[[], None]) -> None:
    """At the ``at``-th image that is written."""
    write, seen = gallery.Store.write, []

    def interrupted(self: gallery.Store, index: int, x: torch.Tensor) -> None:
        seen.append(index)
        if len(seen) == at:
            how()
        write(self, index, x)

    monkeypatch.setattr(gallery.Store, "write", interrupted)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [4, COUNT + 3])
def test_interrupted(
    signum: int, at: int, argv: list[str], vae: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """While it draws, or while it decodes: one line, which says how it goes on; so it does."""
    argv = [*argv, "--vae", str(vae)]
    handler = signal.getsignal(signal.SIGTERM)
    # a shell starts what runs in the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with monkeypatch.context() as patch:
        interrupt(patch, at, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(SystemExit) as left:
            run_main("fpdm.sample", main, argv)
    assert left.value.code == 130
    told = capsys.readouterr().err
    assert told == "fpdm.sample: interrupted; the same command goes on with what is missing\n"
    assert signal.getsignal(signal.SIGTERM) == handler
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("0*")}
    assert len(there) == at - 1
    main(argv)
    assert {p: p.stat().st_mtime_ns for p in there} == there
    assert len(npz(tmp_path / "out")["arr_0"]) == COUNT
