"""Verdicts that good data gets and bad loses; what is shipped; the command."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from test_metrics import normal, whole
from torch.nn import functional as F

from fpdm import classifier, evaluate, exports, quality, shards
from fpdm.config import (
    ConfigError,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SamplerConfig,
    UserError,
)
from fpdm.data import open_dataset
from fpdm.pretrained import load_source

# assets


def test_classifier_is_small_good_and_of_the_committed_half():
    x, y = whole("reference")
    about = classifier.about()
    assert classifier.WEIGHTS.stat().st_size < 200_000
    assert about["data"] == open_dataset(DataConfig(split="train")).fingerprint
    assert about["accuracy_reference"] >= 0.975
    assert classifier.accuracy(x, y, classifier.shipped()) == about["accuracy_reference"]
    assert classifier.accuracy(x, y.roll(1), classifier.shipped()) < 0.3
    f = classifier.features(x[:3], classifier.shipped())
    assert (f.shape, f.dtype) == ((3, 64), torch.float64)


def test_committed_baseline_is_what_the_digits_give():
    committed = quality.baseline()
    digest = hashlib.sha256(classifier.WEIGHTS.read_bytes()).hexdigest()
    assert committed["classifier_sha256"] == digest
    fresh = quality.measure_baseline(classifier.shipped())
    assert fresh["seeds"] == committed["seeds"] == list(range(20))
    assert fresh["data"] == committed["data"]
    assert fresh["per_half"] == committed["per_half"] == 898
    for name in ("frechet", "mmd", "frechet_mean", "frechet_std", "unstratified_frechet_mean"):
        # the mmd is a small difference of kernels of size 10^2 to 10^4
        np.testing.assert_allclose(fresh[name], committed[name], rtol=1e-7, atol=1e-9)
    assert committed["frechet_mean"] == pytest.approx(np.mean(committed["frechet"]), rel=1e-12)


def test_training_is_a_function_of_the_data_alone():
    x, y = whole("train")
    torch.manual_seed(0)
    first = classifier.train(x, y, steps=3)
    torch.manual_seed(1)
    again = classifier.train(x, y, steps=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = classifier.train(*whole("reference"), steps=3)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_augmentation_moves_half_of_the_images_and_shakes_every_pixel():
    x = torch.full((4000, 1, 8, 8), -1.0, dtype=torch.float64)
    x[:, :, 3, 4] = 9.0
    out = classifier.augment(x, seed=5, step=2)
    where = (out > 5).flatten(1).double().argmax(dim=1)
    assert set(where.tolist()) == {8 * r + c for r in (2, 3, 4) for c in (3, 4, 5)}
    still = (where == 28).double().mean().item()
    assert abs(still - (0.5 + 0.5 / 9)) < 0.04
    noise = (out - out.round()).abs()
    assert noise.max() <= classifier.AMPLITUDE
    assert (noise > 0).all()


@pytest.mark.slow
def test_script_makes_the_shipped_weights():
    from bench.make_digits_classifier import make_classifier

    x, y = whole("train")
    fresh, shipped = classifier.train(x, y), classifier.shipped()
    for name, w in shipped.items():
        torch.testing.assert_close(fresh[name].float(), w, rtol=0, atol=1e-5)
    # rounding of another machine does not grow: a start that is off by 1e-14 ends within 1e-9
    start = {n: w * (1 + 1e-14 * normal(*w.shape)) for n, w in classifier.initial().items()}
    other = classifier.train(x, y, start)
    assert max((other[n] - fresh[n]).abs().max().item() for n in fresh) < 1e-9
    assert make_classifier() == make_classifier()


def test_damaged_weights_are_one_clear_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="cannot be read"):
        classifier.read(path)
    path.write_bytes(classifier.WEIGHTS.read_bytes()[:-5])
    with pytest.raises(UserError, match="cannot be read"):
        classifier.read(path)
    weights = load_file(classifier.WEIGHTS)
    save_file(weights | {"conv1.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="expected"):
        classifier.read(path)


# verdicts


def verdicts(x, y, sets=1) -> dict[str, bool | None]:
    found = quality.evaluate_samples(x, y, sets)
    return {result.name: result.passed for result in found.results}


ALL = ("conditional accuracy", "Frechet distance", "nearest-digit ratio")


def failed(x, y, sets=1) -> set[str]:
    found = verdicts(x, y, sets)
    assert all(found[name] is not None for name in ALL)
    return {name for name in ALL if not found[name]}


def test_unseen_digits_pass_everything():
    x, y = whole("reference")
    found = quality.evaluate_samples(x, y)
    assert found.passed
    assert all(found.results[i].passed for i in range(3))
    assert abs(found.results[1].value) < 1e-6
    assert found.results[2].value == 1.0
    assert found.details["exact_copies"] == 0
    shaken = x + 0.05 * normal(*x.shape).float()
    assert failed(shaken.repeat(2, 1, 1, 1), y.repeat(2), sets=2) == set()


def test_each_fault_fails_what_it_should():
    x, y = whole("reference")
    train, train_y = whole("train")
    noise = normal(*x.shape).float()
    assert failed(noise, y) == {"conditional accuracy", "Frechet distance"}  # far from any digit
    # memory: perfect by every measure but one
    assert failed(train[:898], train_y[:898]) == {"nearest-digit ratio"}
    nearly = train[:898] + 0.03 * noise
    assert failed(nearly, train_y[:898]) == {"nearest-digit ratio"}
    assert failed(x, (y + 1) % 10) == {"conditional accuracy"}
    first = torch.tensor([(y == c).nonzero()[0, 0] for c in range(10)])
    assert failed(x[first[y]], y) >= {"Frechet distance"}  # one image per digit
    blurred = 0.75 * x + 0.25 * F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    assert failed(blurred, y) >= {"Frechet distance"}
    assert failed(0.8 * (x + 1) - 1, y) >= {"Frechet distance"}


def test_samples_that_are_not_finite_fail_everything():
    x, y = whole("reference")
    x = x.clone()
    x[3, 0, 1, 1] = math.nan
    found = quality.evaluate_samples(x, y)
    assert [r.passed for r in found.results] == [False] * 3
    assert "1 of 898" in found.title
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["results"][0]["value"] is None


def test_one_bad_set_of_four_shows():
    x, y = whole("reference")
    good = quality.evaluate_samples(x.repeat(4, 1, 1, 1), y.repeat(4), sets=4)
    spoiled = x.repeat(4, 1, 1, 1)
    spoiled[3 * 898 :] = 0.5 * (spoiled[3 * 898 :] + 1) - 1
    found = quality.evaluate_samples(spoiled, y.repeat(4), sets=4)
    values = [part["frechet"] for part in found.details["sets"]]
    assert max(values[:3]) < 1e-6 < values[3]
    assert found.results[1].value == pytest.approx(values[3] / 4, rel=1e-6)
    assert good.passed
    assert not found.passed


def test_other_set_sizes_get_no_frechet_verdict():
    x, y = whole("reference")
    found = quality.evaluate_samples(x[:100], y[:100])
    assert found.results[1].passed is None
    assert "no verdict: sets of 100" in found.results[1].note


def test_values_outside_the_range_are_shown_clamped():
    x, y = whole("reference")
    outside = x + (x >= 1).float() - 2 * (x <= -1).float()
    assert verdicts(outside, y) == verdicts(x, y)
    loud = quality.evaluate_samples(outside, y).results[2].value
    assert loud == quality.evaluate_samples(x, y).results[2].value


@pytest.mark.parametrize(
    ("shape", "labels", "sets", "words"),
    [
        ((4, 3, 8, 8), [0] * 4, 1, "expected \\(N,1,8,8\\)"),
        ((4, 1, 8, 8), [0] * 3, 1, "with \\(3,\\) labels"),
        ((4, 1, 8, 8), [0] * 4, 3, "sets: got 3 of 4 samples"),
        ((4, 1, 8, 8), [0] * 4, 4, "2 or more"),
        ((4, 1, 8, 8), [0, 1, 2, 10], 1, "expected 0..9"),
    ],
)
def test_what_does_not_fit_is_refused(shape, labels, sets, words):
    with pytest.raises(ConfigError, match=words):
        quality.evaluate_samples(torch.zeros(shape), labels, sets)


def test_table_says_value_target_and_verdict():
    x, y = whole("reference")
    lines = quality.evaluate_samples(x, (y + 1) % 10).table().splitlines()
    assert lines[0].startswith("digits: 1 x 898 samples; classifier 0.9")
    assert ">= 0.95" in lines[1]
    assert "FAIL" in lines[1]
    assert "<= 3.386" in lines[2]
    assert "pass" in lines[2]
    assert "of real halves" in lines[4]


class Fake:
    """A data set of images without a classifier."""

    shape, num_classes, fingerprint = (3, 4, 4), 2, "fake"

    def __init__(self, x: torch.Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices, flips=None):
        return self.x[torch.from_numpy(indices)], torch.zeros(len(indices), dtype=torch.int64)


def test_other_images_get_distances_and_are_told_what_is_missing():
    train, held_out = normal(1500, 3, 4, 4).float(), normal(40, 3, 4, 4, seed=1).float()
    alone = quality.evaluate_pixels(held_out, Fake(train))
    assert [r.passed for r in alone.results] == [None]
    assert "classifier for the digits only" in alone.table()
    assert "--held_out" in alone.table()
    assert not alone.passed
    new = quality.evaluate_pixels(normal(40, 3, 4, 4, seed=2), Fake(train), Fake(held_out))
    assert new.passed
    copied = quality.evaluate_pixels(train[-40:], Fake(train), Fake(held_out))
    assert copied.results[0].value == 0
    assert not copied.passed


# the command


@pytest.fixture
def exported(tmp_path):
    config = ModelConfig(
        input_size=8, in_channels=1, hidden_size=16, num_heads=2, patch_size=4, num_classes=10
    )
    model = random_model(config)
    exports.export(
        tmp_path / "export", config, model.state_dict(), which="raw",
        diffusion=DiffusionConfig(), extra={},
    )  # fmt: skip
    return tmp_path / "export"


FEW = ["--sample.steps", "2", "--sample.iters", "1", "--sample.batch", "449"]


def test_command_measures_an_export(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(exported), "--sets", "2", *FEW]
    assert evaluate.command(argv) == 0
    told = capsys.readouterr().out
    assert "FAIL" in told
    # an export may be installed or shared: it stays as it was
    assert sorted(p.name for p in exported.iterdir()) == ["config.json", "model.safetensors"]
    (found,) = (tmp_path / "evaluations").iterdir()
    assert told.endswith(f"wrote evaluations/{found.name}\n")
    written = json.loads(found.read_text())
    assert written["passed"] is False
    assert len(written["details"]["sets"]) == 2
    assert written["sample"]["steps"] == 2
    assert evaluate.command([*argv, "--strict"]) == 1
    assert json.loads(found.read_text()) == written
    other = exported.parent / "other.json"
    assert evaluate.command([*argv, "--seed", "7", "--out", str(other)]) == 0
    results = [json.loads(p.read_text())["results"] for p in (other, found)]
    assert results[0] != results[1]
    # other settings have a file of their own
    assert evaluate.command([*argv, "--seed", "7"]) == 0
    assert len(list((tmp_path / "evaluations").iterdir())) == 2
    assert json.loads(found.read_text()) == written


def test_a_budget_takes_the_place_of_iterations(exported, tmp_path):
    """The export's own cost is one of iters, budget and budget_macs; exactly one may be left."""
    argv = ["--sets", "1", "--sample.steps", "2", "--sample.budget", "8", "--out", str(tmp_path)]
    assert evaluate.command([str(exported), *argv]) == 0
    sample = json.loads((tmp_path / "evaluation.json").read_text())["sample"]
    assert (sample["iters"], sample["budget"]) == (None, 8)


def test_a_place_that_cannot_be_written_costs_no_measurement(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*x\.json.*; expected a directory"):
        evaluate.command([str(exported), *FEW, "--out", str(tmp_path / "file" / "x.json")])


def test_command_refuses_in_one_line(exported, tmp_path):
    def run(*argv):
        with pytest.raises(UserError) as caught:
            evaluate.command([*argv])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "expected a run directory" in run(str(tmp_path / "nothing"))
    assert "did you mean --sets" in run(str(exported), "--set", "3")
    assert "did you mean --sample.steps?" in run(str(exported), "--stpes", "3")
    assert "did you mean --budgets?" in run(str(exported), "--sweep", "--bugdets", "140")
    assert "sets: got 0, expected at least 1" in run(str(exported), "--sets", "0")
    assert "--count: got one with a model of the digits" in run(str(exported), "--count", "8")
    assert "--data.flip, --held_out: got" in run(
        str(exported), "--sweep", "--data.flip=true", "--held_out", "x"
    )
    told = run(str(exported), "--sample.reuse_gamma", "0.5")
    assert told == (
        "sample.reuse_gamma: got 0.5 with sample.reuse none, expected sample.reuse blend"
    )
    assert "weights: got 'best'" in run(str(exported), "--weights", "best")


def test_other_models_need_their_data(tmp_path):
    config = ModelConfig(input_size=4, in_channels=3, hidden_size=16, num_heads=2, num_classes=2)
    exports.export(
        tmp_path, config, random_model(config).state_dict(), which="raw",
        diffusion=DiffusionConfig(), extra={},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"data.kind: got digits, expected the images or latents"):
        evaluate.command([str(tmp_path), *FEW])


def test_image_model_is_measured_against_its_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i in range(18):
        folder = tmp_path / ("train" if i < 12 else "held") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (normal(4, 4, 3, seed=i) * 60 + 128).clamp(0, 255).byte().numpy()
        image.fromarray(pixels).save(folder / f"{i}.png")
    config = ModelConfig(input_size=4, in_channels=3, hidden_size=16, num_heads=2, num_classes=2)
    out = tmp_path / "export"
    exports.export(
        out, config, random_model(config).state_dict(), which="raw",
        diffusion=DiffusionConfig(), extra={},
    )  # fmt: skip
    data = ["--data.kind", "images", "--data.path", str(tmp_path / "train")]
    argv = [str(out), *FEW, *data, "--data.image_size", "4", "--sets", "1", "--count", "8"]
    assert evaluate.command([*argv, "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert [r["name"] for r in found["results"]] == ["nearest distance"]
    argv += ["--held_out", str(tmp_path / "held")]
    with pytest.raises(ConfigError, match=r"held_out: got .*held, expected  of .*evaluation.json"):
        evaluate.command([*argv, "--out", str(out)])
    assert evaluate.command([*argv, "--out", str(tmp_path / "other.json")]) == 0
    found = json.loads((tmp_path / "other.json").read_text())
    assert [r["name"] for r in found["results"]] == ["nearest distance", "nearest ratio"]
    # the training images are no others, under another name neither
    shutil.copytree(tmp_path / "train", tmp_path / "copy")
    argv = argv[:-1]
    for name in ("train", "copy"):
        with pytest.raises(ConfigError, match=rf"held_out: got .*{name}, the training images them"):
            evaluate.command([*argv, str(tmp_path / name), "--out", str(tmp_path / "a.json")])
    shutil.copy(tmp_path / "held" / "a" / "12.png", tmp_path / "copy" / "a")
    with pytest.raises(ConfigError, match="held_out: got images of which 12 of 13 are training im"):
        evaluate.command([*argv, str(tmp_path / "copy"), "--out", str(tmp_path / "a.json")])


def test_latents_of_an_export_are_measured_at_its_scale(tmp_path):
    """Whatever scale they are stored with, unless another one is asked for."""
    x = normal(12, 4, 4, 4).float().numpy()
    for name, scale in (("train", 0.5), ("held", 2.0)):
        shards.write_shards(
            [(x * scale + (name == "held"), np.arange(12) % 2, None)], tmp_path / name,
            dtype="float32", latent_scale=scale, rows_per_shard=16,
        )  # fmt: skip
    config = ModelConfig(input_size=4, in_channels=4, hidden_size=16, num_heads=2, num_classes=2)
    out = tmp_path / "export"
    exports.export(
        out, config, random_model(config).state_dict(), which="raw",
        diffusion=DiffusionConfig(), extra={"latent_scale": 1.0},
    )  # fmt: skip
    source, seen = load_source(out), []
    sample = SamplerConfig(steps=2, iters=1)
    for scale, expected in ((None, 1.0), (3.0, 3.0)):
        data = DataConfig(kind="latents", path=str(tmp_path / "train"), latent_scale=scale)
        options = evaluate.Options(sample, data, 1, 4, 0, str(tmp_path / "held"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "evaluate_pixels", lambda *args: seen.append(args))
            evaluate.evaluate(source, options)
        _, train, held_out = seen[-1]
        assert (train.latent_scale, held_out.latent_scale) == (expected, expected)
        assert np.allclose(train.batch(np.arange(12))[0].numpy(), x * expected, atol=1e-6)


def test_help_needs_no_source():
    argv = [sys.executable, "-m", "fpdm.evaluate", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--strict" in done.stdout
    assert "--sample.steps" in done.stdout
    assert "[SOURCE]" in done.stdout
