"""The command ``python -m fpdm.sample``: what it writes, what it resumes, what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from PIL import Image

from fpdm import exports, figures, gallery, sample
from fpdm.cli import run_main
from fpdm.config import (
    ConfigError,
    DiffusionConfig,
    ModelConfig,
    SamplerConfig,
    to_dict,
)
from fpdm.engine import Sampler
from fpdm.kernels import implementations
from fpdm.pretrained import load_source
from fpdm.request import choose_images, parser
from fpdm.sample import main

MODEL = ModelConfig(input_size=4, in_channels=1, hidden_size=16, num_heads=2, num_classes=3)
SETTINGS = SamplerConfig(steps=2, iters=2, batch=3)
DIT = ModelConfig(
    kind="dit", depth=1, pre_depth=0, post_depth=0, input_size=4, in_channels=3, hidden_size=16,
    num_heads=2, num_classes=3,
)  # fmt: skip


def export(path: Path, model: ModelConfig = MODEL, settings: SamplerConfig = SETTINGS) -> Path:
    return exports.export(
        path, model, random_model(model).state_dict(), which="ema", diffusion=DiffusionConfig(),
        extra={"sample": to_dict(settings)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("source") / "tiny")


def pngs(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.png") if path.stem.isdigit())


def npz(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz") as file:
        return dict(file)


def complain(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refused command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_main("fpdm.sample", main, argv)
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("fpdm.sample: error: ")
    assert told.count("\n") == 1
    return told


def test_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main([str(source), "--out", str(out), "--count", "6", "--seed", "40"])
    found, told = npz(out), capsys.readouterr().out
    assert found["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert found["seeds"].tolist() == list(range(40, 46))
    loaded = load_source(source)
    assert (loaded.name, loaded.which) == ("tiny", "ema")
    assert loaded.sampler_config == SETTINGS
    x = (
        Sampler(loaded.model, loaded.diffusion, SETTINGS)
        .sample([0, 0, 1, 1, 2, 2], range(40, 46))
        .x
    )
    adm = (127.5 * x.permute(0, 2, 3, 1) + 128).clamp(0, 255).to(torch.uint8).numpy()
    assert found["arr_0"].shape == (6, 4, 4, 1)
    assert np.array_equal(found["arr_0"], adm)
    for i, name in enumerate(pngs(out)):
        assert name == f"{i:06d}.png"
        with Image.open(out / name) as image:
            assert np.array_equal(np.asarray(image), adm[i, :, :, 0])
    with Image.open(out / "grid.png") as image:
        assert image.size[0] < image.size[1]  # two columns, three rows
    assert sorted(p.name for p in out.iterdir() if not p.stem.isdigit()) == [
        "grid.png", "samples.npz", "settings.json",
    ]  # fmt: skip
    # (1 + 2 + 1) blocks twice
    for words in (
        "8 blocks",
        "MACs",
        "ms per image",
        " 2 ",
        "adaln",
        implementations.choose("auto", "cpu", torch.float32),
        "first > last",
    ):
        assert words in told


def test_a_second_run_completes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [str(source), "--out", str(out), "--count", "7"]
    main(argv)
    whole, written = npz(out), {p: p.stat().st_mtime_ns for p in out.glob("0*.png")}
    data = (out / "samples.npz").read_bytes()
    main(argv)
    assert "0 made, 7 were there" in capsys.readouterr().out
    (out / "000001.png").unlink()
    (out / "000004.png").write_bytes((out / "000005.png").read_bytes()[:-20])
    (out / "samples.npz").unlink()
    main([*argv, "--batch", "1"])
    assert "2 made, 5 were there" in capsys.readouterr().out
    changed = [p.name for p, when in written.items() if p.stat().st_mtime_ns != when]
    assert sorted(changed) == ["000001.png", "000004.png"]
    again = npz(out)
    assert np.abs(again["arr_0"].astype(int) - whole["arr_0"].astype(int)).max() <= 1
    (out / "000001.png").unlink()
    (out / "000004.png").unlink()
    main(argv)
    assert np.array_equal(npz(out)["arr_0"].shape, whole["arr_0"].shape)
    assert len((out / "samples.npz").read_bytes()) == len(data)


def test_tolerance(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means over those that ran an iteration; a fixed k says nothing about iterations."""
    out, argv = tmp_path / "out", [str(source), "--count", "6", "--iters", "9"]
    main([*argv, "--out", str(tmp_path / "fixed")])
    assert "iterations mean" not in capsys.readouterr().out
    main(
        [*argv, "--out", str(out), "--tol", "0.2", "--allocation", "adaptive", "--max-iters", "12"]
    )
    told = capsys.readouterr().out
    assert "at most k 9, adaptive, reuse none, tolerance 0.2" in told
    loaded = load_source(source)
    config = replace(SETTINGS, iters=9, tol=0.2, allocation="adaptive", max_iters=12)
    stats = Sampler(loaded.model, loaded.diffusion, replace(config, batch=6)).sample(
        [0, 0, 1, 1, 2, 2], range(6)
    ).stats  # fmt: skip
    mean = stats.iterations.double().mean()
    assert 1 <= mean < 9
    assert f"iterations mean {mean:.3g} of 9 per timestep" in told
    rows = stats.residual.nanmean(2)
    last = [row[~row.isnan()] for row in rows]
    t, k = 999, len(last[0])
    assert f"{t:4d} {k:2d} {last[0][0]:.0e}>{last[0][-1]:.0e}" in told
    settings = json.loads((out / "settings.json").read_text())
    assert settings["sample"]["tol"] == 0.2
    assert not {"batch", "graphs"} & set(settings["sample"])


def test_shards_agree(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["--count", "8", "--labels", "2,0", "--method", "ddpm", "--guidance", "2"]
    main([str(source), "--out", str(whole), *argv])
    for i in (2, 0, 1):
        assert not (parts / "samples.npz").exists()
        main([str(source), "--out", str(parts), *argv, "--shard", f"{i}/3"])
    found, expected = npz(parts), npz(whole)
    assert found["labels"].tolist() == [2, 0] * 4
    assert np.abs(found["arr_0"].astype(int) - expected["arr_0"].astype(int)).max() <= 1
    assert "not all there" in capsys.readouterr().out
    # other ids, other images: the comparison can fail
    shifted = np.roll(expected["arr_0"], 1, axis=0).astype(int)
    assert np.abs(found["arr_0"].astype(int) - shifted).max() > 10


def test_invariant_shards_are_bitwise(source: Path, tmp_path: Path) -> None:
    argv = [str(source), "--count", "5", "--invariant", "--reuse", "full"]
    main([*argv, "--out", str(tmp_path / "a"), "--batch", "4"])
    for i in range(2):
        main([*argv, "--out", str(tmp_path / "b"), "--batch", "1", "--shard", f"{i}/2"])
    for name in [*pngs(tmp_path / "a"), "samples.npz", "grid.png"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


OCCURRENCES = (1, 4, 8, 9)
# one import and first use of torch for all; with one thread no pool is lost in the fork
KILLED = """
import os, sys
from fpdm.cli import run_main
from fpdm.sample import main
source, root = sys.argv[1:3]
main([source, "--out", f"{root}/whole", "--count", "7"])
sys.stdout.flush()
for occurrence in sys.argv[3:]:
    child = os.fork()
    if not child:
        os.environ["FPDM_FAILPOINT"] = f"atomic-write:{occurrence}"
        run_main("fpdm.sample", main, [source, "--out", f"{root}/{occurrence}", "--count", "7"])
    print("ended", occurrence, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, int]]:
    """A folder of output directories named by occurrence, and how each process ended."""
    root = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(source), str(root), *map(str, (*OCCURRENCES, 99))]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, timeout=120, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return root, {int(x[1]): int(x[2]) for x in lines if x[:1] == ["ended"]}


@pytest.mark.parametrize("occurrence", OCCURRENCES)
def test_killed_while_writing(
    occurrence: int, source: Path, killed: tuple[Path, dict[int, int]]
) -> None:
    """Settings, seven images, npz: killed just before the n-th of them appears."""
    root, status = killed
    out = root / str(occurrence)
    argv = [str(source), "--out", str(out), "--count", "7"]
    assert status[occurrence] == -signal.SIGKILL
    assert status[99] == 0  # never reached: nothing else kills
    store = gallery.Store(out, MODEL)
    there = pngs(out)
    assert len(there) == min(max(0, occurrence - 2), 7)
    assert all(store.read(int(name[:6])) is not None for name in there)
    assert not (out / "samples.npz").exists()
    before = {name: (out / name).stat().st_mtime_ns for name in there}
    main(argv)
    assert {name: (out / name).stat().st_mtime_ns for name in there} == before
    assert len(npz(out)["arr_0"]) == len(pngs(out)) == 7
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_other_settings_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [str(source), "--out", str(out), "--count", "4"]
    main(argv)
    told = complain([*argv, "--steps", "3"], capsys)
    assert "sample.steps: got 3, expected 2 of" in told
    assert "count: got 4, expected 5" not in told
    assert "seeds: got 1+i, expected 0+i of" in complain([*argv, "--seed", "1"], capsys)
    assert "count: got 5, expected 4 of" in complain([*argv[:-1], "5"], capsys)
    other = export(tmp_path / "other", replace(MODEL, num_classes=4))
    assert "source." in complain([str(other), *argv[1:]], capsys)
    (out / "settings.json").write_text("[")
    assert "settings.json: got no settings" in complain(argv, capsys)


def test_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(MODEL, in_channels=4)
    path, out = export(tmp_path / "latents", model), tmp_path / "out"
    main([str(path), "--out", str(out), "--labels", "all"])
    loaded = load_source(path)
    x = Sampler(loaded.model, loaded.diffusion, SETTINGS).sample([0, 1, 2], [0, 1, 2]).x
    found = npz(out)
    assert found["arr_0"].dtype == np.float32
    assert np.array_equal(found["arr_0"], x.numpy())
    assert "3 latents: --vae makes pictures of them" in capsys.readouterr().out
    assert pngs(out) == []
    assert np.array_equal(np.load(out / "000002.npy"), x[2].numpy())


def test_stranded_blocks_are_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(source), "--count", "1", "--budget", "11"]
    main([*argv, "--out", str(tmp_path / "a")])
    assert "per image  10 blocks (1 stranded)" in capsys.readouterr().out
    main([*argv, "--out", str(tmp_path / "b"), "--allocation", "increasing"])
    assert "per image  11 blocks, " in capsys.readouterr().out


def test_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = export(tmp_path / "dit", DIT, replace(SETTINGS, iters=None)), tmp_path / "out"
    main([str(path), "--out", str(out), "--count", "3"])
    told = capsys.readouterr().out
    assert "2 blocks" in told
    assert "no fixed point" in told
    assert npz(out)["arr_0"].shape == (3, 4, 4, 3)


def test_images_that_are_not_finite_are_told(tmp_path: Path) -> None:
    model = random_model(MODEL)
    with torch.no_grad():
        model.final_layer.linear.weight.fill_(3e38)  # an export holds no NaN; this makes one
    path = exports.export(
        tmp_path / "nan", MODEL, model.state_dict(), which="ema", diffusion=DiffusionConfig(),
        extra={"sample": to_dict(SETTINGS)},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="3 of 3 images hold NaN or Inf"):
        main([str(path), "--count", "3", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--labels", "3"], "labels: got 3, expected integers 0..2"),
        (["--labels", "-1"], "labels: got -1, expected integers 0..2"),
        (["--labels", "x"], "labels: got 'x', expected integers"),
        (["--count", "0"], "count: got 0, expected at least 1"),
        (["--count", "x"], "count: got 'x', expected an integer"),
        (["--seeds", "1,2", "--count", "3"], "seeds: got 2 for 3 labels"),
        (["--seed", "-1"], "seeds: got -1, expected"),
        (["--seed", str(2**64)], f"seeds: got {2**64}, expected"),
        (["--batch", "0"], "sample.batch: got 0, expected at least 1"),
        (["--steps", "0"], "sample.steps: got 0, expected at least 1"),
        (["--steps", "1001"], "1001"),
        (["--iters", "0"], "0"),
        (["--budget", "3"], "3"),
        (["--iters", "2", "--budget", "9"], "not allowed with"),
        (["--guidance", "nan"], "sample.guidance: got nan"),
        (["--spacing", "leading"], "leading"),
        (["--method", "magic"], "method: got 'magic', expected one of ddim"),
        (["--schedule", "2,x"], "schedule: got '2,x', expected integers"),
        (["--shard", "2/2"], "shard: got '2/2', expected i/n with 0 <= i < n"),
        (["--device", "toaster"], "device: got 'toaster', expected"),
        (["--device", "meta"], "device: got 'meta', expected"),
        (["--weights", "raw"], "weights: got raw, expected ema"),
        (["--impl", "magic"], "magic"),
        (["--stepz", "3"], "unknown option --stepz; did you mean --steps?"),
        (["--sample.stpes=3"], "unknown option --sample.stpes; did you mean --steps?"),
        (["--sample.reuse", "full"], "unknown option --sample.reuse; did you mean --reuse?"),
        (["--max_iter", "3"], "unknown option --max_iter; did you mean --max-iters?"),
        (["--zzz"], "error: unknown option --zzz\n"),
        (["other"], "got 'other', expected no more than"),
        (["--eta", "-1"], "sample.eta: got -1.0, expected 0 to 1"),
        (["--eta", "1.5"], "sample.eta: got 1.5, expected 0 to 1"),
        (["--tol", "-1"], "sample.tol: got -1.0, expected at least 0"),
        (["--allocation", "adaptive"], "sample.tol: got 0.0, expected more than 0 with"),
        (["--allocation", "learned"], "sample.allocation: got learned without a calibration"),
        (["--max-iters", "3"], "sample.max_iters: got 3, expected none without"),
        (["--graphs", "on", "--device", "cpu"], "sample.graphs: got on, expected auto or off on"),
        (["--guidance-low", "2"], "guidance_low, guidance_high: got 2.0, 1.0, expected 0 <="),
        (["--calibrate", "0"], "calibrate: got 0 images, expected at least 1"),
        (["--calibrate", "8", "--labels", "3"], "labels: got it with --calibrate, which draws"),
        (["--calibrate", "8", "--out", "there"], "out: got it with --calibrate, which draws"),
        (["--calibrate", "8", "--report"], "report: got it with --calibrate, which draws"),
        (
            ["--guidance-channels", "2", "--guidance", "2"],
            "sample.guidance_channels: got 2, expected 1..1",
        ),
        (["--gamma", "0.5"], "sample.reuse_gamma: got 0.5 with sample.reuse none, expected"),
        (
            ["--rho", "0.2", "--compare", "blend"],
            "sample.reuse_rho: got 0.2 with sample.reuse none",
        ),
    ],
)
def test_bad_input(
    argv: list[str], words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    # calibrating has no place for images
    place = [] if "--calibrate" in argv and "--out" not in argv else ["--out", str(out)]
    assert words in complain([str(source), *place, *argv], capsys)
    assert not out.exists()


def test_bad_places(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"source: got {tmp_path}, expected a run directory" in complain([str(tmp_path)], capsys)
    (tmp_path / "file").write_text("")
    told = complain([str(source), "--out", str(tmp_path / "file")], capsys)
    assert str(tmp_path / "file") in told
    damaged = export(tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (damaged / "model.safetensors").write_bytes(bytes(data))
    assert "model.safetensors" in complain([str(damaged)], capsys)


def test_operators_that_were_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, Any] = {"adaln": {"reference": 2}, "attention": {"reference": 3}}
    monkeypatch.setattr(implementations, "counters", lambda: counted)
    assert implementations.ran("reference") == "reference: adaln 2, attention 3"
    counted["adaln"]["triton"] = 1
    with pytest.raises(implementations.ImplError, match="expected all on reference, as announced"):
        implementations.ran("reference")


def test_settings_hold_the_weights(source: Path, tmp_path: Path) -> None:
    main([str(source), "--out", str(tmp_path / "out"), "--count", "1"])
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["source"]["sha256"] == load_source(source).digest()
    assert "batch" not in settings["sample"]
    with pytest.raises(ConfigError, match="weights: got 'both'"):
        load_source(source, "both")


def test_solver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--count", "4", "--steps", "3", "--iters", "6", "--tol", "1e-3"]
    main([*words, "--solver", "anderson", "--out", str(tmp_path / "a")])
    assert ", tolerance 0.001, anderson, guidance" in capsys.readouterr().out
    main([*words, "--out", str(tmp_path / "b")])
    assert ", anderson" not in capsys.readouterr().out
    ours, plain = (np.load(tmp_path / x / "samples.npz")["arr_0"] for x in "ab")
    assert ours.shape == plain.shape


def test_report(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the images of this process, whether they were made now or before, and of another reuse."""
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "plot_report", lambda *args: drawn.append(args) or True)
    argv = [str(source), "--out", str(tmp_path / "out"), "--count", "7", "--shard", "1/2"]
    monkeypatch.setattr(sample, "REPORTED", 2)
    main([*argv, "--report"])
    loaded = load_source(source)
    labels, seeds, _ = choose_images(parser().parse_args(["--count", "7"]), 3)
    for reuse in ("none", "full"):
        main([*argv, "--report"] if reuse == "none" else [*argv, "--compare", reuse])
        runs, timesteps, path, tol = drawn[-1]
        assert (timesteps, path, tol) == ([999, 499], tmp_path / "out" / "report.png", 0.0)
        assert list(runs) == ["reuse none", "reuse full"][: 1 + (reuse == "full")]
        residual, iterations = runs[f"reuse {reuse}"]
        stats = Sampler(loaded.model, loaded.diffusion, replace(SETTINGS, reuse=reuse)).sample(
            labels[1::2][:2], seeds[1::2][:2]
        ).stats  # fmt: skip
        assert torch.equal(residual, stats.residual)
        assert torch.equal(iterations, stats.iterations[:, 0])
    # those that were made now are not drawn again: a whole batch of three
    assert drawn[0][0]["reuse none"][0].shape == (2, 2, 3)
    assert torch.equal(drawn[0][0]["reuse none"][0][..., :2], drawn[1][0]["reuse none"][0])


def test_comparison() -> None:
    """Medians over images and timesteps but the first, of what an image ran."""
    nan = float("nan")
    residual = torch.tensor([[[9.0, 9.0], [9.0, 9.0]], [[0.5, 0.7], [nan, 0.1]]])
    other = torch.tensor([[[9.0, 9.0], [9.0, 9.0]], [[0.2, 0.3], [nan, nan]]])
    runs = {
        "reuse none": (residual, torch.tensor([[2, 2], [1, 2]])),
        "reuse full": (other, torch.tensor([[2, 2], [1, 1]])),
    }
    head, *lines = sample.comparison(runs)
    assert "after the first timestep" in head
    assert [line.split(None, 2)[2] for line in lines] == [
        "1.5  5e-01>1e-01", "1.0  2e-01>2e-01  33% fewer",
    ]  # fmt: skip
    lines = sample.comparison(dict(reversed(runs.items())))
    assert lines[2].endswith("50% more")
    alone = {title: (values[:1], ran[:1]) for title, (values, ran) in runs.items()}
    assert sample.comparison(alone)[1].split()[2:] == ["2.0", "9e+00>9e+00"]


def test_report_picture(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(source), "--out", str(tmp_path / "out"), "--count", "2"]
    main([*argv, "--compare", "extrapolate"])
    told = capsys.readouterr().out
    assert f"wrote      {tmp_path / 'out' / 'report.png'}" in told
    assert re.findall(r"^ +(reuse \w+) +2\.0  \S+>\S+$", told, re.M) == [
        "reuse none", "reuse extrapolate",
    ]  # fmt: skip
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(figures.PNG_MAGIC)
    told = complain([*argv, "--compare", "none"], capsys)
    assert "compare: got none, the run's own, expected another reuse" in told


def test_out_that_is_a_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").touch()
    told = complain([str(source), "--out", str(tmp_path / "x")], capsys)
    assert told.endswith(
        f"out: got the file {tmp_path}/x, expected a directory, new or of these settings\n"
    )
