"""What ``python -m fpdm.sample`` does not take for its own, and what it refuses to ignore."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sample import MODEL, complain, export
from test_vae import save_vae

from fpdm import figures
from fpdm.request import choose_images, parser
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


def test_residuals_of_a_complete_directory(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Its first images are sampled again for the picture, as they are for a report."""
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "plot_residuals", lambda *args: drawn.append(args) or True)
    argv = [str(source), "--out", str(tmp_path), "--count", "3", "--residuals"]
    for _ in range(2):
        main(argv)
        assert f"wrote      {tmp_path}/residuals.png\n" in capsys.readouterr().out
    (now, timesteps, path), (later, *same) = drawn
    assert same == [timesteps, path] == [[999, 499], tmp_path / "residuals.png"]
    torch.testing.assert_close(later.nanmean(dim=2), now)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--labels", "0,1,2", "--seeds", "5,6"], "labels: got 3 for 2 images, expected at most"),
        (["--labels", "0,1,2", "--count", "2"], "labels: got 3 for 2 images, expected at most"),
        (["--count", "100000000000"], "count: got 100000000000, expected at least 1 and at most"),
        (["--seeds", "0-99999999999"], "seeds: got the range 0-99999999999, expected first-last"),
        (["--vae-batch", "3"], "vae-batch: got 3 without --vae, expected none"),
        (["--vae-batch", "8"], "vae-batch: got 8 without --vae, expected none"),
        (["--calibrate", "8", "--vae-batch", "8"], "vae-batch: got it with --calibrate"),
        (["--calibrate", "8", "--tol", "0.1"], "tol: got 0.1 with --calibrate, which runs every"),
        (["--calibrate", "8", "--allocation", "increasing"], "allocation: got increasing with --c"),
        (["--calibrate", "-5"], "calibrate: got -5 images, expected at least 1"),
        (
            ["--schedule", "3,2", "--allocation", "increasing"],
            "allocation: got increasing with --schedule",
        ),
        (
            ["--guidance", "8", "--guidance-high", "0.1", "--steps", "2"],
            "sample.guidance_low, guidance_high: got 0 and 0.1, expected an interval with one of "
            "the timesteps' t/(T-1): 1, 0.499",
        ),
    ],
)
def test_what_would_be_ignored_or_never_end(
    argv: list[str], words: str, source: Path, tmp_path: Path, monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert words in complain([str(source), *argv], capsys)
    assert list(tmp_path.iterdir()) == []


def test_all_labels_may_be_more_than_the_images() -> None:
    """They are a default's word, not a list that somebody wrote."""
    assert choose_images(parser().parse_args(["--labels", "all", "--count", "2"]), 3)[0] == [0, 1]
