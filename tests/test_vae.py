"""Encoding and decoding against diffusers' own calls, and VAEs that are none."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpdm import noise
from fpdm.config import ConfigError
from fpdm.vae import VAE, load_vae

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


def save_vae(path: Path, **changes: Any) -> Path:
    """A tiny VAE whose pictures are half as high as wide in no direction: factor 2, 4 channels."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 16), "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4, "norm_num_groups": 4,
        "sample_size": 16,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(changes.pop("seed", 0))
        module = diffusers.AutoencoderKL(**(config | changes))
        with torch.no_grad():  # as it is made, it draws gray on gray
            module.decoder.conv_out.weight.mul_(8)
    module.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def vae(tiny: Path) -> VAE:
    return load_vae(str(tiny), CPU)


def pictures(count: int = 5) -> tuple[Tensor, list[str]]:
    """In [-1,1], and hashes of files."""
    x = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return x, [f"{7 * i:08x}{i:08x}" + 48 * "0" for i in range(count)]


def test_what_it_is(vae: VAE) -> None:
    assert (vae.name, vae.channels, vae.factor, vae.scale, vae.shift) == ("tiny", 4, 2, 0.18215, 0)
    assert vae.latent_size(256) == 128
    for size in (15, 0, -2):
        with pytest.raises(ConfigError, match=f"image-size: got {size}, expected a multiple of 2"):
            vae.latent_size(size)
    assert not vae.module.training


def test_encoding_is_diffusers_own(vae: VAE) -> None:
    """mean + std * noise of its distribution, times 0.18215."""
    x, hashes = pictures()
    got = vae.encode(x, 3, hashes, noise.ENCODE)
    with torch.no_grad():
        found = vae.module.encode(x).latent_dist
    keys = noise.as_keys([3] * 5)
    high, low = (torch.tensor([int(h[a : a + 8], 16) for h in hashes]) for a in (0, 8))
    z = noise.normals(keys, high, low, noise.ENCODE, (4, 8, 8))
    assert torch.equal(got, (found.mean + found.std * z) * 0.18215)
    # its own sample under the same seed of torch, but for the numbers drawn
    torch.manual_seed(0)
    own = found.sample()
    torch.manual_seed(0)
    torch.testing.assert_close(own, found.mean + found.std * torch.randn(5, 4, 8, 8))
    assert found.std.min() > 0.1, "the noise shows"
    assert got.dtype == torch.float32


def test_decoding_is_diffusers_own(vae: VAE) -> None:
    x, _ = pictures()
    with torch.no_grad():
        mean = vae.module.encode(x).latent_dist.mean
        own = vae.module.decode(mean).sample
    torch.testing.assert_close(vae.decode(mean * 0.18215), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(mean * 3.0, scale=3.0), own, rtol=1e-4, atol=1e-4)
    assert own.std() > 0.1
    # control: unscaled latents are other pictures
    assert (vae.decode(mean) - own).abs().max() > 0.1


def test_a_latent_is_of_seed_and_image(vae: VAE) -> None:
    """Not of the batch, nor of the place in it."""
    x, hashes = pictures()
    whole = vae.encode(x, 0, hashes, noise.ENCODE)
    single = [vae.encode(x[i : i + 1], 0, hashes[i : i + 1], noise.ENCODE) for i in range(5)]
    torch.testing.assert_close(torch.cat(single), whole, rtol=0, atol=1e-6)
    order = [3, 1, 4, 0, 2]
    turned = vae.encode(x[order], 0, [hashes[i] for i in order], noise.ENCODE)
    torch.testing.assert_close(turned, whole[order], rtol=0, atol=1e-6)
    # controls: noise by the place in the batch, another seed, another domain
    placed = vae.encode(x[order], 0, hashes, noise.ENCODE)
    for other in (placed[order.index(3)], vae.encode(x, 1, hashes, noise.ENCODE)[3],
                  vae.encode(x, 0, hashes, noise.ENCODE_FLIP)[3]):  # fmt: skip
        assert (other - whole[3]).abs().max() > 0.1


def test_more_than_fits(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(x: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")

    x, hashes = pictures()
    for name, option, work in (
        ("encode", "--batch", lambda: vae.encode(x, 0, hashes, noise.ENCODE)),
        ("decode", "--vae-batch", lambda: vae.decode(torch.zeros(5, 4, 8, 8))),
    ):
        monkeypatch.setattr(vae.module, name, full)
        with pytest.raises(ConfigError, match=f"got 5 images at once, .* of cpu, .* {option}$"):
            work()


def test_shift(tmp_path: Path, vae: VAE) -> None:
    shifted = load_vae(str(save_vae(tmp_path / "shifted", shift_factor=0.5)), CPU)
    x, hashes = pictures()
    latents = shifted.encode(x, 0, hashes, noise.ENCODE)
    plain = vae.encode(x, 0, hashes, noise.ENCODE)
    torch.testing.assert_close(latents, plain - 0.5 * 0.18215)
    torch.testing.assert_close(shifted.decode(latents), vae.decode(plain), rtol=1e-4, atol=1e-4)


def test_where_it_may_lie(
    tiny: Path, tmp_path: Path, vae: VAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipeline; with the names of tensors that Stable Diffusion's files have; as half
    precision; on a hub."""
    inner = save_vae(tmp_path / "pipeline" / "vae")
    assert load_vae(str(tmp_path / "pipeline"), CPU).sha256 == vae.sha256
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(inner / WEIGHTS)
    for new, name in old.items():
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v
                 for k, v in state.items()}  # fmt: skip
    assert sum("query" in name for name in state) == 4
    save_file(state, inner / WEIGHTS)
    assert load_vae(str(inner), CPU).sha256 == vae.sha256
    save_file({k: v.half() for k, v in state.items()}, inner / WEIGHTS)
    half = load_vae(str(inner), CPU)
    assert half.module.dtype == torch.float32
    assert half.sha256 != vae.sha256
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    kind = diffusers.AutoencoderKL

    def answer(was: Any, where: Any, subfolder: Any, **rest: Any) -> Any:
        if str(where) != str(tiny):  # it asks itself too
            asked.append((where, subfolder))
        return was(tiny, **rest)

    for function in ("load_config", "from_pretrained"):
        monkeypatch.setattr(kind, function, functools.partial(answer, getattr(kind, function)))
    assert load_vae("owner/some.vae", CPU).name == "owner/some.vae"
    load_vae("owner/pipeline/vae", CPU)
    assert asked == [("owner/some.vae", None)] * 2 + [("owner/pipeline", "vae")] * 2


@pytest.mark.slow
def test_a_hub_that_was_asked_before(tiny: Path, tmp_path: Path, vae: VAE) -> None:
    """From its cache, without network, by diffusers and huggingface_hub as they are."""
    for name, inner in (("one", ""), ("pipeline", "vae")):
        model, commit = tmp_path / f"models--owner--{name}", "a" * 40
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(commit)
        shutil.copytree(tiny, model / "snapshots" / commit / inner)
    code = "import sys; from fpdm.vae import *\n"
    code += "print(load_vae(sys.argv[1], torch.device('cpu')).sha256)"
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    for name in ("owner/one", "owner/pipeline/vae", "owner/pipeline"):
        done = subprocess.run(
            [sys.executable, "-c", code, name], env=env, capture_output=True, text=True
        )
        if name == "owner/pipeline":
            assert "where a pipeline's is OWNER/NAME/vae" in done.stderr
        else:
            assert done.stdout.split() == [vae.sha256], done.stderr


def reconfigure(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


def reweigh(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        state = load_file(path / WEIGHTS)
        change(state)
        save_file(state, path / WEIGHTS)

    return rewrite


def pickled(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "diffusion_pytorch_model.bin")
    (path / WEIGHTS).unlink()


NAME = "decoder.conv_in.bias"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another model": (reconfigure(_class_name="UNet2DModel"), "a UNet2DModel, expected an Auto"),
    "a tensor less": (reweigh(lambda s: s.pop(NAME)), f"with 1 tensors amiss, .* missing {NAME}"),
    "a tensor more": (reweigh(lambda s: s.update(x=torch.ones(1))), "tensors amiss.*unexpected x"),
    "another shape": (reweigh(lambda s: s.update({NAME: torch.ones(3)})), "cannot be loaded: "),
    "pickle": (pickled, f"cannot be loaded: .*{WEIGHTS}"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), f"cannot be loaded: .*{WEIGHTS}"),
    "truncated": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-9]),
        f"cannot be loaded: .*{WEIGHTS}",
    ),
    "no config": (lambda path: (path / "config.json").unlink(), r"cannot be loaded: .*config.json"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), r"loaded: .*not a valid JSON"),
    "means": (reconfigure(latents_mean=[0.0] * 4), "with latents_mean, expected scaling_factor"),
    "no scale": (reconfigure(scaling_factor=0), "scaling_factor 0, expected more than 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_refusals(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, words = FAULTS[fault]
    path = save_vae(tmp_path / "vae")
    change(path)
    with pytest.raises(ConfigError, match=f"^vae: got {path}.*{words}") as error:
        load_vae(str(path), CPU)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", ""), "diffusers says nothing beside it"


def test_diffusers_itself_takes_the_first_three_faults(tmp_path: Path) -> None:
    """Negative control: without our look at what was loaded they would pass."""
    for fault in list(FAULTS)[:3]:
        path = save_vae(tmp_path / fault)
        FAULTS[fault][0](path)
        diffusers.AutoencoderKL.from_pretrained(path, use_safetensors=True)


def test_places_and_an_absent_package(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gray = save_vae(tmp_path / "gray", in_channels=1)
    with pytest.raises(ConfigError, match="of 1 in, 3 out, expected 3 channels of pixels"):
        load_vae(str(gray), CPU)
    for name in ("nowhere", "./vae", "/a/b", str(tiny / WEIGHTS), ""):
        with pytest.raises(ConfigError, match="expected a directory or a hub's OWNER/NAME"):
            load_vae(name, CPU)

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no such thing\nand more")

    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", offline)
    with pytest.raises(
        ConfigError, match=r"\(no directory here; asked of .*/vae\): no such thing and more$"
    ):
        load_vae("owner/name", CPU)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"^vae: diffusers is not installed, .*fpdm\[diffusers\]"):
        load_vae(str(tiny), CPU)
