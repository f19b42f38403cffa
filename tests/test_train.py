from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from runs import (
    FAST,
    MODEL,
    HashingTrainer,
    OverflowTrainer,
    changed,
    fingerprint,
    orphans,
    small,
    stopping,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

from fpdm import checkpoint, noise
from fpdm.batches import Loader, draw_flips, draw_iterations, draw_samples, local_slots
from fpdm.checks import check_data
from fpdm.config import ConfigError, FixedPointConfig, ModelConfig, UserError
from fpdm.data import open_dataset
from fpdm.kernels import implementations
from fpdm.model import from_pretrained
from fpdm.recipes import load_config
from fpdm.train import Trainer

DIT = ModelConfig(
    kind="dit", depth=2, pre_depth=0, post_depth=0, input_size=8, patch_size=2, in_channels=1,
    hidden_size=32, num_heads=2, num_classes=10,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def rows(config) -> list[dict]:
    path = Trainer(config).directory.metrics
    return [json.loads(line) for line in path.read_text().splitlines()]


def chi_square(counts: np.ndarray, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# draws


def test_iterations_are_inclusive_and_uniform():
    config = FixedPointConfig(n_min=0, n_max=4, m_min=1, m_max=5)
    draws = np.array([draw_iterations(7, step, 0, config) for step in range(4000)])
    n, m = np.bincount(draws[:, 0], minlength=5), np.bincount(draws[:, 1], minlength=6)
    assert len(n) == 5
    assert len(m) == 6
    assert m[0] == 0
    # 99.9 % point of chi square with 4 degrees of freedom is 18.5; draws are fixed by the seed
    assert chi_square(n, 800) < 18.5
    assert chi_square(m[1:], 800) < 18.5
    joint = np.bincount(draws[:, 0] * 5 + draws[:, 1] - 1, minlength=25)
    assert chi_square(joint, 160) < 51.2  # 24 degrees of freedom
    assert chi_square(np.bincount(draws[:, 0] // 2, minlength=5), 800) > 18.5


def test_iterations_depend_on_seed_step_and_micro_batch_but_not_on_the_rank():
    wide = FixedPointConfig(n_max=10**6, m_max=10**6)
    base = draw_iterations(1, 2, 3, wide)
    assert draw_iterations(1, 2, 3, wide, rank=5) == base
    others = [
        draw_iterations(2, 2, 3, wide),
        draw_iterations(1, 3, 3, wide),
        draw_iterations(1, 2, 4, wide),
        draw_iterations(1, 2, 3, replace(wide, draws="per_rank"), rank=1),
    ]
    assert len({base, *others}) == 5
    jfb = FixedPointConfig(n_min=3, n_max=3, m_min=1, m_max=1)
    assert {draw_iterations(0, s, 0, jfb) for s in range(20)} == {(3, 1)}


def test_samples_are_drawn_by_slot():
    x, y = torch.zeros(6, 1, 8, 8), torch.arange(6)
    whole = draw_samples(1, 5, range(10, 16), x, y, 1000, 0.5, 10)
    part = draw_samples(1, 5, range(12, 14), x[2:4], y[2:4], 1000, 0.5, 10)
    for name in ("t", "noise", "y"):
        assert torch.equal(getattr(whole, name)[2:4], getattr(part, name))
    later = draw_samples(1, 6, range(10, 16), x, y, 1000, 0.5, 10)
    assert not torch.equal(whole.noise, later.noise)
    assert not torch.equal(whole.t, later.t)
    assert np.array_equal(draw_flips(1, 5, range(10, 16))[2:4], draw_flips(1, 5, range(12, 14)))


class Copies(TorchDispatchMode):
    """Copies from the CPU to another device: of pageable memory the host waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = [a for a in args if isinstance(a, torch.Tensor) and a.device.type == "cpu"]
        if (
            isinstance(out, torch.Tensor)
            and out.device.type != "cpu"
            and any(a.dim() for a in sources)
        ):
            self.found.append(func._schema.name)
        return out


def test_drawing_copies_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a micro-batch on another device; planted: the keys made on the host."""

    def draw() -> list[str]:
        x, y = torch.zeros(2, 1, 4, 4, device="meta"), torch.zeros(2, device="meta").long()
        with Copies() as copies:
            d = draw_samples(2**64 - 1, 5, range(2), x, y, 1000, 0.5, 10)
        assert d.noise.shape == x.shape
        return copies.found

    assert draw() == []
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *a, device, **k: full(*a, **k).to(device))
    assert "aten::_to_copy" in draw()


def test_statistics_of_timesteps_dropout_noise_and_flips():
    count, p = 20_000, 0.1
    x, y = torch.zeros(count, 1, 1, 1), torch.full((count,), 3)
    d = draw_samples(0, 1, range(count), x, y, 1000, p, 10)
    dropped = int((d.y == 10).sum())
    sigma = math.sqrt(count * p * (1 - p))
    assert abs(dropped - count * p) < 4 * sigma
    assert set(d.y.tolist()) == {3, 10}
    assert int(d.t.min()) == 0
    assert int(d.t.max()) == 999
    assert chi_square(np.bincount(d.t.numpy() // 100), count / 10) < 27.9  # 9 degrees, 99.9 %
    assert abs(float(d.noise.mean())) < 4 / math.sqrt(count)
    assert abs(float(d.noise.var()) - 1) < 4 * math.sqrt(2 / count)
    flips = draw_flips(0, 1, range(count)).sum()
    assert abs(flips - count / 2) < 4 * math.sqrt(count) / 2
    for p, expected in ((0.0, {3}), (1.0, {10})):
        got = draw_samples(0, 1, range(count), x, y, 1000, p, 10)
        assert set(got.y.tolist()) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_slots_of_all_ranks_are_the_micro_batch(world):
    got = [s for a in range(3) for r in range(world) for s in local_slots(30, 3, a, r, world)]
    assert got == list(range(30))


def test_each_sample_once_per_epoch_whatever_the_ranks():
    class Rank:
        device = torch.device("cpu")

        def __init__(self, rank: int, world: int) -> None:
            self.rank, self.world = rank, world

    config = small(None, batch=29, steps=100)
    data = open_dataset(config.data)
    assert len(data) == 31 * 29  # the epoch ends with a batch
    seen = []
    for rank in range(2):
        loader = Loader(data, config, Rank(rank, 2))
        seen += [i for step in range(31) for micro in loader.get(step) for i in micro.ids]
        loader.close()
    assert sorted(seen) == sorted(set(seen))
    assert len(seen) == len(data)


# runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("whole"))
    assert Trainer(config).run() == 40
    return config, fingerprint(config)


def test_a_run_leaves_what_it_promises(whole, capsys):
    config, _ = whole
    directory = Trainer(config).directory
    got = rows(config)
    assert [r["step"] for r in got] == [*range(3, 40, 3), 40]
    assert all(0 < r["loss"] < 20 and r["grad_norm"] > 0 and r["residual"] >= 0 for r in got)
    assert all(0 <= r["n"] <= 2 and 1 <= r["m"] <= 2 and r["lr"] == 1e-3 for r in got)
    assert got[-1]["loss"] < got[0]["loss"]
    assert directory.sample(40).read_bytes()[:4] == b"\x89PNG"
    timing = [json.loads(line) for line in directory.timing.read_text().splitlines()]
    assert [r["step"] for r in timing] == [r["step"] for r in got]
    assert all(r["images_per_s"] > 0 and r["peak_memory"] > 1e6 for r in timing)
    saved = sorted(p.name for p in directory.checkpoints.iterdir())
    assert saved == [".lock", "step_0000030", "step_0000035", "step_0000040"]
    model = from_pretrained(directory.export)
    newest = checkpoint.load_newest(directory.checkpoints)
    for name, p in model.named_parameters():
        assert torch.equal(p, newest.tensors["ema"][name])
    assert not orphans(config)


def test_the_same_run_twice_is_the_same_bits(whole, tmp_path):
    again = changed(whole[0], out=str(tmp_path))
    Trainer(again).run()
    assert fingerprint(again) == whole[1]
    other = changed(whole[0], out=str(tmp_path), name="other", seed=4)
    Trainer(other).run()
    assert fingerprint(other) != whole[1]


@pytest.mark.parametrize("steps", [(1, 2, 4), (15, 39), (20,)])
def test_resume_is_bit_identical(whole, tmp_path, steps):
    config = changed(whole[0], out=str(tmp_path))
    for step in steps:
        assert stopping(step)(config).run() == step
    assert Trainer(config).run() == 40
    assert fingerprint(config) == whole[1]
    assert not orphans(config)


class ForgetfulTrainer(Trainer):
    """Negative control: resumes without Adam's second moments."""

    def _restore(self, state) -> None:
        super()._restore(state)
        self.optimizer.flat["v"].zero_()


def test_a_lost_moment_or_row_would_be_seen(whole, tmp_path):
    config = changed(whole[0], out=str(tmp_path))
    stopping(15)(config).run()
    ForgetfulTrainer(config).run()
    got = fingerprint(config)
    assert {k for k in got if got[k] != whole[1][k]} >= {"metrics", "ema/final_layer.linear.bias"}

    config = changed(config, name="rows")
    stopping(14)(config).run()
    metrics = Trainer(config).directory.metrics
    metrics.write_text(metrics.read_text() + '{"step": 15, "loss": 1.0}\n{"step": 18, "lo')
    Trainer(config).run()
    assert fingerprint(config) == whole[1]


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"model": DIT}, {"clip_norm": 0.5}])
def test_other_settings_resume_bit_identically(tmp_path, changes):
    one = small(tmp_path, name="one", steps=12, **changes)
    Trainer(one).run()
    two = changed(one, name="two")
    stopping(7)(two).run()
    Trainer(two).run()
    assert fingerprint(one) == fingerprint(two)
    loss = [r["loss"] for r in rows(one)]
    assert loss[-1] < loss[0]
    if "model" in changes:
        assert rows(one)[-1]["n"] is None
        assert rows(one)[-1]["residual"] is None


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    fixed = FixedPointConfig(n_min=1, n_max=1, m_min=2, m_max=2)
    parameters, losses = [], []
    for accumulate in (1, 2, 4):
        config = small(
            tmp_path, name=str(accumulate), steps=6, accumulate=accumulate, fixed_point=fixed,
            weight_decay=0.1, clip_norm=1.0, log_every=1, eps=1e-3,
        )  # fmt: skip
        trainer = Trainer(config)
        trainer.run()
        parameters.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append([r["loss"] for r in rows(config)])
    for other, loss in zip(parameters[1:], losses[1:]):
        # eps = 1e-3 keeps Adam from turning the rounding of a tiny gradient into a whole step
        assert (other - parameters[0]).abs().max() < 1e-5
        assert loss == pytest.approx(losses[0], rel=1e-5)
    config = small(tmp_path, name="seed", steps=6, seed=9, fixed_point=fixed, eps=1e-3)
    trainer = Trainer(config)
    trainer.run()
    moved = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert (moved - parameters[0]).abs().max() > 1e-3


def test_the_grid_shows_the_average_and_disturbs_nothing(whole, tmp_path):
    config = changed(whole[0], out=str(tmp_path), grid_every=5)
    Trainer(config).run()
    assert fingerprint(config) == whole[1]
    samples = Trainer(config).directory.root / "samples"
    assert len(list(samples.iterdir())) == 8


# half precision and bad numbers


def test_half_precision_survives_overflows(tmp_path):
    """200 steps of fp16 on the CPU, an overflow forced in every 40th."""
    settings = {"steps": 200, "save_every": 0, "log_every": 10, "scale_growth_interval": 25}
    full = small(tmp_path, name="fp32", **settings)
    half = small(tmp_path, name="fp16", precision="fp16", **settings)
    Trainer(full).run()
    OverflowTrainer(half).run()
    got = rows(half)
    assert got[-1]["skipped"] == 5
    # doubled after 25 good steps, halved in every 40th
    high = [r["step"] % 40 == 30 for r in got]
    assert [r["scale"] for r in got] == [half.train.scale_init * (2 if h else 1) for h in high]
    means = [np.mean([r["loss"] for r in rows(c)[-5:]]) for c in (full, half)]
    assert means[1] == pytest.approx(means[0], rel=0.01)
    bad = [json.loads(line) for line in Trainer(half).directory.nonfinite.open()]
    assert [(r["step"], r["cause"]) for r in bad] == [(s, "gradient") for s in range(40, 201, 40)]


class AlwaysOverflow(OverflowTrainer):
    EVERY = 5
    ALWAYS = True


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_twenty_bad_steps_in_a_row_end_the_run(tmp_path, precision):
    config = small(tmp_path, precision=precision)
    with pytest.raises(UserError, match="step 24: 20 non-finite steps in a row"):
        AlwaysOverflow(config).run()
    directory = Trainer(config).directory
    assert len(directory.nonfinite.read_text().splitlines()) == 20
    newest = checkpoint.load_newest(directory.checkpoints)
    assert newest.finite


def test_a_bad_step_changes_nothing_and_names_its_samples(tmp_path, capsys):
    class Planted(Trainer):
        def _micro_step(self, step, micro, n, m):
            if step == 3:
                micro.x[2] = math.nan
            return super()._micro_step(step, micro, n, m)

        def _skip(self, mine):
            before = [t.clone() for g in self.optimizer.state().values() for t in g.values()]
            super()._skip(mine)
            after = [t for g in self.optimizer.state().values() for t in g.values()]
            assert all(torch.equal(a, b) for a, b in zip(before, after))
            self.seen = True

    config = small(tmp_path, steps=6)
    trainer = Planted(config)
    trainer.run()
    assert trainer.seen
    assert trainer.counters.skipped == 1
    row = json.loads(trainer.directory.nonfinite.read_text())
    loader = Loader(open_dataset(config.data), config, trainer.ranks)
    assert row["step"] == 4
    assert row["ids"] == [loader.read(3)[0].ids[2]]
    loader.close()
    assert "skipped on all ranks" in capsys.readouterr().out
    assert all(t.isfinite().all() for t in trainer.optimizer.ema.values())


def test_a_scale_that_keeps_hitting_its_floor_ends_the_run(tmp_path):
    class Alternating(OverflowTrainer):
        EVERY = 2

    config = small(tmp_path, steps=200, precision="fp16", scale_floor=1024.0, max_nonfinite=8)
    with pytest.raises(UserError, match=r"8 non-finite steps at the lowest loss scale 1024"):
        Alternating(config).run()


# refusals


def refused(config, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        Trainer(config).run()
    assert "\n" not in str(caught.value)


def test_a_changed_run_is_refused_by_field(whole, tmp_path):
    config = changed(whole[0], out=str(tmp_path), steps=5)
    Trainer(config).run()
    before = fingerprint(config)
    refused(changed(config, seed=8), r"train\.seed: 3 -> 8")
    refused(replace(config, optim=replace(config.optim, lr=1.0)), r"optim\.lr: 0\.001 -> 1\.0")
    wider = replace(config, model=replace(config.model, hidden_size=64))
    refused(wider, r"model\.hidden_size: 32 -> 64")
    refused(replace(config, data=replace(config.data, split="all")), r"data\.split: train -> all")
    refused(changed(config, resume="never"), "train.resume: got never")
    assert fingerprint(config) == before
    Trainer(changed(config, steps=6, save_every=1, keep=2, grid_per_class=2)).run()
    decays = changed(replace(config, optim=replace(config.optim, lr_final=0.0)), name="decays")
    Trainer(decays).run()
    why = r"train\.steps: 5 -> 6 \(optim\.lr_final is reached at the last step\); expected the same"
    refused(changed(decays, steps=6), why)


def test_changed_data_is_refused(tmp_path, monkeypatch):
    import fpdm.train as module

    config = small(tmp_path, steps=2)
    Trainer(config).run()

    def other(data):
        found = open_dataset(data)
        monkeypatch.setattr(found, "fingerprint", "0" * 64, raising=False)
        return found

    monkeypatch.setattr(module, "open_dataset", other)
    refused(config, "data: got fingerprint 0000000000000000, expected .* the data changed")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch": 0}, r"train\.batch: got 0"),
        ({"batch": 15, "accumulate": 2}, r"train\.batch: got 15, expected a multiple"),
        ({"steps": 0}, r"train\.steps: got 0"),
        ({"model": replace(MODEL, input_size=16)}, r"input_size.*16"),
        ({"model": replace(MODEL, num_classes=9)}, r"num_classes.*9"),
        ({"model": DIT, "sample": FAST}, r"sample: got iters for a DiT"),
        ({"label_dropout": 1.5}, r"train\.label_dropout: got 1\.5"),
        ({"device": "cuda"}, r"train\.device: got cuda"),
    ],
)
def test_settings_that_cannot_be_met(tmp_path, changes, match):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    rest = {k: v for k, v in changes.items() if k != "sample"}

    def run() -> None:
        config = small(tmp_path, **rest)
        Trainer(replace(config, sample=changes.get("sample", config.sample))).run()

    with pytest.raises(ConfigError, match=match):
        run()
    # nor empty directories
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_refused_before_step_1(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Trainer, "local_step", None)
    refused(small(tmp_path / "file"), r"train\.out: got .*file/run, expected a directory")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(small(tmp_path / "locked"), r"train\.out")


def test_a_wrong_implementation_is_not_hidden(tmp_path):
    class Announced(Trainer):
        def _open_log(self):
            super()._open_log()
            self.impl = "triton"

    with pytest.raises(implementations.ImplError, match="expected all on triton, as announced"):
        Announced(small(tmp_path, steps=2)).run()


def test_counter_words_are_wide_enough():
    noise.integers(2**64 - 1, 2**20, 2**31, noise.TRAIN_ITERS, 0, 3)
    draw_iterations(2**63, 2**31, 2**14, FixedPointConfig(draws="per_rank"), rank=1000)


def test_hashes_differ_step_by_step(tmp_path):
    config = small(tmp_path, steps=3)
    HashingTrainer(config).run()
    hashes = (Trainer(config).directory.root / "hashes.0").read_text().split()
    assert len(set(hashes)) == 3


def test_a_model_that_does_not_fit_is_told_every_option_at_once():
    class Data:
        shape, num_classes = (3, 16, 16), 7

    told = r"model\.in_channels, input_size, num_classes: got 1, 8, 10, expected the data's: "
    told += r"--model\.in_channels 3 --model\.input_size 16 --model\.num_classes 7$"
    with pytest.raises(ConfigError, match=told):
        check_data(load_config("digits"), Data())
