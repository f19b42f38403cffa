"""Runs that begin with the weights of another one (``train.init``)."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import (
    MODEL,
    HashingTrainer,
    changed,
    fingerprint,
    finish,
    small,
    start,
    start_pair,
    stopping,
)  # fmt: skip

from fpdm import checkpoint, figures, sample
from fpdm.config import Config, ConfigError, DataConfig, ModelConfig, UserError, to_dict
from fpdm.data import open_dataset
from fpdm.exports import export
from fpdm.images import ImageFolder
from fpdm.model import build_model, from_pretrained
from fpdm.pretrained import load_source
from fpdm.recipes import load_config
from fpdm.shards import write_shards
from fpdm.start import class_names
from fpdm.train import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
DIT = ModelConfig(
    kind="dit", depth=2, pre_depth=0, post_depth=0, input_size=8, patch_size=2, in_channels=1,
    hidden_size=32, num_heads=2, num_classes=10,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "plot_history", lambda metrics, path: False)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, whose average is not its weights."""
    config = small(tmp_path_factory.mktemp("old"), name="old", steps=6)
    Trainer(config).run()
    return Path(config.train.out) / "old"


def tuned(out: Path, init: Path, **changes: Any) -> Config:
    return small(out, name="new", steps=8, save_every=2, init=str(init), lr=1e-4, **changes)


def newest(run: Path) -> checkpoint.Checkpoint:
    found = checkpoint.load_newest(run / "checkpoints")
    assert found is not None
    return found


class Begun(Trainer):
    """Keeps what it was before its first step."""

    def _loop(self) -> bool:
        groups = self.optimizer.state().items()
        self.first = {g: {n: t.clone() for n, t in tensors.items()} for g, tensors in groups}
        return super()._loop()


def test_it_begins_with_the_average_and_a_fresh_optimiser(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ema = newest(old).tensors["ema"]
    for name, init in (("run", old), ("export", old / "export")):
        trainer = Begun(changed(tuned(tmp_path, init), name=name))
        trainer.run()
        for key, value in ema.items():
            assert torch.equal(trainer.first["model"][key], value)
            assert torch.equal(trainer.first["ema"][key], value)
        assert not any(t.any() for t in trainer.first["optim"].values())
        assert trainer.step == 8
        told = capsys.readouterr().out
        assert f"begins with {init}: " in told
        assert "label table" not in told
        assert "other settings" not in told
        # which weights these were stays known
        meta = newest(tmp_path / name).meta["init"]
        assert meta["sha256"] in told
        extra = json.loads((tmp_path / name / "export" / "config.json").read_text())["extra"]
        assert extra["init"] == meta
    # the same weights, the same run
    a, b = (fingerprint(changed(tuned(tmp_path, old), name=name)) for name in ("run", "export"))
    assert a == b
    # control: without it a run begins elsewhere
    trainer = Begun(changed(tuned(tmp_path, old), name="none", init=""))
    trainer.run()
    assert any(not torch.equal(trainer.first["ema"][key], value) for key, value in ema.items())
    assert newest(tmp_path / "none").meta["init"] is None


class Killed(Trainer):
    """Dies in its fifth step."""

    def local_step(self, step: int) -> None:
        super().local_step(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_bit_for_bit_without_the_other(old: Path, tmp_path: Path) -> None:
    init = tmp_path / "there"
    shutil.copytree(old, init)
    whole = tuned(tmp_path / "a", init)
    Trainer(whole).run()
    cut = changed(whole, out=str(tmp_path / "b"))
    assert finish(start(cut, tmp_path / "log", Killed)) == -signal.SIGKILL
    shutil.rmtree(init)
    assert newest(tmp_path / "b" / "new").step == 4
    stopping(6)(cut).run()
    Trainer(cut).run()
    assert fingerprint(cut) == fingerprint(whole)
    metas = [newest(tmp_path / name / "new").meta for name in "ab"]
    assert metas[0]["init"] == metas[1]["init"]
    # control: one that was killed before its first checkpoint has to begin again
    with pytest.raises(ConfigError, match=r"^train\.init: got .*there, expected a run directory"):
        Trainer(changed(cut, name="unsaved")).run()
    assert not (tmp_path / "b" / "unsaved").exists()


def test_a_resumed_run_is_the_same_run(old: Path, tmp_path: Path) -> None:
    config = tuned(tmp_path, old)
    stopping(3)(config).run()
    for other in ("", str(old / "export")):
        with pytest.raises(ConfigError, match=r"is of another run: train\.init: ") as told:
            Trainer(changed(config, init=other)).run()
        assert str(told.value).endswith("or another train.name")
    with pytest.raises(ConfigError, match="got never"):
        Trainer(changed(config, resume="never")).run()


def test_ranks_begin_alike(old: Path, tmp_path: Path) -> None:
    """Rank 1 gets the weights from rank 0; together they take the steps of one."""
    config = tuned(tmp_path, old)
    children = start_pair(config, tmp_path / "log", HashingTrainer)
    assert [finish(child) for child in children] == [0, 0], (tmp_path / "log.0").read_text()
    hashes = [(tmp_path / "new" / f"hashes.{r}").read_text() for r in range(2)]
    assert hashes[0] == hashes[1]
    assert "begins with" in (tmp_path / "log.0").read_text()
    assert "begins with" not in (tmp_path / "log.1").read_text()
    alone = changed(config, name="alone")
    Trainer(alone).run()
    a, b = (newest(tmp_path / name).tensors["ema"] for name in ("new", "alone"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def refused(config: Config, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        Trainer(config).run()
    assert "\n" not in str(caught.value)
    # nor is anything left
    assert not (Path(config.train.out) / config.train.name).exists()


def test_what_no_run_can_begin_with_is_refused(old: Path, tmp_path: Path) -> None:
    refused(tuned(tmp_path, tmp_path / "no"), r"^train\.init: got .*no, expected a run directory")
    refused(tuned(tmp_path, old / "checkpoints"), r"^train\.init: got .*; did you mean .*/old\?")
    wider = tuned(tmp_path, old, model=replace(MODEL, hidden_size=48, pre_depth=2))
    refused(
        wider,
        r"^train\.init: got .* of another model: model\.hidden_size: 32 -> 48; model\.pre_depth: "
        r"1 -> 2; expected the same but for num_classes$",
    )
    refused(tuned(tmp_path, old, model=DIT), r"of another model: model\.kind: fpdm -> dit; ")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused(tuned(tmp_path, tmp_path / "empty"), r"^train\.init: got .* without a checkpoint")
    damaged = tmp_path / "damaged"
    shutil.copytree(old / "export", damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    refused(tuned(tmp_path, damaged), r"^train\.init: .*model\.safetensors")
    # NaN reaches no export; a run may hold it
    found = newest(old)
    poisoned: dict[str, Any] = {g: dict(named) for g, named in found.tensors.items()}
    name = next(iter(poisoned["ema"]))
    poisoned["ema"][name] = torch.full_like(poisoned["ema"][name], float("nan"))
    checkpoint.save(tmp_path / "nan" / "checkpoints", 6, poisoned, found.meta, 1)
    refused(tuned(tmp_path, tmp_path / "nan"), r"^train\.init: .* holds NaN or Inf")


def test_a_run_that_does_not_resume_names_the_way(old: Path, tmp_path: Path) -> None:
    shutil.copytree(old, tmp_path / "old")
    same = small(tmp_path, name="old", steps=6)
    way = f"--train.name NEW --train.init {tmp_path / 'old'}"
    for config in (
        replace(same, optim=replace(same.optim, lr=1.0)),
        replace(same, data=replace(same.data, split="all")),
    ):
        with pytest.raises(ConfigError, match="is of another run") as told:
            Trainer(config).run()
        assert str(told.value).endswith(way)
        Trainer(changed(config, name=f"new{config.optim.lr}", init=str(tmp_path / "old"))).run()
    wider = replace(same, model=replace(MODEL, hidden_size=64))
    with pytest.raises(ConfigError, match=r"or another train\.name$"):
        Trainer(wider).run()


def test_a_run_of_photos_that_are_turned_now_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    tags = image.Exif()
    tags[0x0112] = 6
    photos = tmp_path / "photos"
    photos.mkdir()
    image.new("L", (8, 8), 90).save(photos / "a.jpg", exif=tags)
    data = DataConfig(kind="images", path=str(photos), image_size=8)
    config = replace(small(tmp_path, steps=2), model=replace(MODEL, num_classes=1), data=data)
    with monkeypatch.context() as older:
        older.setattr(ImageFolder, "fingerprint", property(lambda s: s.former, lambda s, v: None),
                      raising=False)  # fmt: skip
        Trainer(config).run()
    with pytest.raises(ConfigError, match=r": some images are turned .*; a new run that begins"):
        Trainer(config).run()
    image.new("L", (8, 8), 91).save(photos / "a.jpg")
    with pytest.raises(ConfigError, match=r": the data changed since; .*; a new run that begins"):
        Trainer(config).run()


def few(tmp_path: Path, classes: int) -> DataConfig:
    """Latents in the shape of the digits."""
    x = np.random.default_rng(0).standard_normal((32, 1, 8, 8)).astype(np.float32)
    write_shards(
        [(x, np.arange(32) % classes, None)], tmp_path / "data", dtype="float16", latent_scale=1.0,
        rows_per_shard=16,
    )  # fmt: skip
    return DataConfig(kind="latents", path=str(tmp_path / "data"), latent_scale=1.0)


def test_other_classes_begin_with_a_table_of_their_own(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(MODEL, num_classes=3)
    config = replace(tuned(tmp_path, old), model=model, data=few(tmp_path, 3))
    config = replace(config, diffusion=replace(config.diffusion, beta_end=0.01))
    trainer = Begun(config)
    trainer.run()
    table = "y_embedder.embedding_table.weight"
    fresh = build_model(model)
    fresh.initialize(torch.Generator().manual_seed(config.train.seed))
    assert torch.equal(trainer.first["ema"][table], fresh.state_dict()[table])
    for name, value in newest(old).tensors["ema"].items():
        assert name == table or torch.equal(trainer.first["ema"][name], value)
    told = capsys.readouterr().out
    assert (
        "; label table afresh, for 3 classes in place of 10; trained with other settings: " in told
    )
    assert "diffusion.beta_end: 0.02 -> 0.01\n" in told


def test_latents_are_taken_as_they_are_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scale that the manifest says stands in the run; one that was said before is kept to."""
    data = few(tmp_path, 10)
    base = replace(small(tmp_path, steps=4), data=replace(data, latent_scale=None))
    stopping(2)(base).run()
    assert newest(tmp_path / "run").meta["config"]["data"]["latent_scale"] == 1.0
    assert load_source(tmp_path / "run").latent_scale == 1.0
    # the same, said
    stopping(3)(replace(base, data=data)).run()
    older = changed(replace(base, data=replace(data, latent_scale=0.18215)), name="older")
    stopping(2)(older).run()
    with pytest.raises(ConfigError, match=r"data\.latent_scale: 0\.18215 -> 1\.0; expected"):
        Trainer(replace(older, data=base.data)).run()
    assert Trainer(load_config(str(tmp_path / "older" / "config.yaml"))).run() == 4
    # a new run that begins with it may have another, which is said
    capsys.readouterr()
    Trainer(changed(base, name="mended", init=str(tmp_path / "older"))).run()
    assert "other settings: data.latent_scale: 0.18215 -> 1.0\n" in capsys.readouterr().out


def test_the_names_of_classes_stay_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of folders, also in a run's samples; a name may be anything that a file system takes."""
    image = pytest.importorskip("PIL.Image")
    names = ["Zürich", "a b", "line\nbreak"]
    for name in names:
        (tmp_path / "photos" / name).mkdir(parents=True)
        image.new("L", (8, 8), 90).save(tmp_path / "photos" / name / "0.png")
    data = DataConfig(kind="images", path=str(tmp_path / "photos"), image_size=8)
    base = small(tmp_path, steps=2)
    Trainer(replace(base, model=replace(MODEL, num_classes=3), data=data)).run()
    for source in (tmp_path / "run", tmp_path / "run" / "export"):
        assert load_source(source).classes == tuple(sorted(names))
        capsys.readouterr()
        sample.main([str(source), "--count", "1", "--out", str(tmp_path / f"of {source.name}")])
        told = capsys.readouterr().out
        assert "\nclasses    0 Zürich, 1 a b, 2 'line\\nbreak'\n" in told
    # one class has no name, nor have digits; a file that is no origin costs no run
    flat = tmp_path / "photos" / "a b"
    assert class_names(replace(data, path=str(flat)), ImageFolder(flat, 8)) == []
    assert class_names(base.data, open_dataset(base.data)) == []
    latents = few(tmp_path, 3)
    for text in ("", "[]", "[" * 99_999, '{"classes": ["a"]}', '{"classes": 3}'):
        (Path(latents.path) / "origin.json").write_text(text)
        assert class_names(latents, open_dataset(latents)) == []
    (Path(latents.path) / "origin.json").write_text('{"classes": ["x", "y", "z"]}')
    assert class_names(latents, open_dataset(latents)) == ["x", "y", "z"]


def test_published_weights_are_a_beginning(tmp_path: Path) -> None:
    """As fpdm.interop writes them: an export that says little else."""
    model = build_model(MODEL)
    path = export(
        tmp_path / "theirs", MODEL, model.state_dict(), which="raw",
        diffusion=small(tmp_path).diffusion, extra={},
    )  # fmt: skip
    trainer = Begun(tuned(tmp_path, path))
    trainer.run()
    for name, p in from_pretrained(path).named_parameters():
        assert torch.equal(trainer.first["model"][name], p)
    # and a run is one whose configuration says where it began
    assert to_dict(trainer.config)["train"]["init"] == str(path)
