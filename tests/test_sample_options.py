"""What ``python -m fpdm.sample`` does not take for its own, and what it refuses to ignore."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_sample import MODEL, complain, export
from test_vae import save_vae

from fpdm.sample import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("source") / "tiny")


@pytest.mark.parametrize("name", ["000000.png", "grid.png", "samples.npz", "notes.txt"])
def test_somebodys_directory(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither replaced nor told as pictures of these settings."""
    (tmp_path / name).write_bytes(b"mine")
    told = complain([str(source), "--out", str(tmp_path), "--count", "3"], capsys)
    assert f"out: got {tmp_path}, which holds {name} and no settings.json, expected a dir" in told
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {name: b"mine"}


def test_pictures_that_no_vae_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export(tmp_path / "latents", replace(MODEL, in_channels=4))
    out, vae = tmp_path / "out", str(save_vae(tmp_path / "vae"))
    argv = [str(path), "--out", str(out), "--count", "2"]
    main(argv)
    shutil.copy(out / "grid.png", out / "000000.png")
    told = complain([*argv, "--vae", vae], capsys)
    assert f"out: got {out}, which holds 000000.png and no vae.json, expected" in told
    (out / "000000.png").unlink()
    main([*argv, "--vae", vae])
