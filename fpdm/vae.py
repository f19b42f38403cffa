"""Pictures to latents and back, by diffusers' AutoencoderKL: no VAE is written here.

    encode   latents  = (mean + std * noise - shift) * scale     mean, std of x (B,3,H,W) in [-1,1]
    decode   pictures = decoder(latents / scale + shift)         (B,3,H,W), about in [-1,1]

scale and shift are the VAE's own scaling_factor (0.18215 for Stable Diffusion's) and shift_factor.
float32 throughout: decoders of this kind overflow in float16. The noise is a function of seed and
image; the rest of a picture or latent depends on its batch to rounding, as convolutions do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpdm import noise
from fpdm.files import tensors_digest
from fpdm.settings import ConfigError, one_line

CONFIG = "config.json"
TOLD = ("vae.name",)  # recorded, not compared: the hash of its weights identifies a VAE


@dataclass(frozen=True)
class VAE:
    """A VAE whose latents have ``channels`` and are ``factor`` times smaller than pictures;
    ``sha256`` of its weights."""

    module: Any  # diffusers' AutoencoderKL, which is imported where one is loaded
    name: str
    channels: int
    factor: int
    scale: float
    shift: float
    sha256: str

    def latent_size(self, image_size: int) -> int:
        """Of square images; raises ConfigError for a size that does not divide."""
        if image_size < 1 or image_size % self.factor:
            raise ConfigError(
                f"image-size: got {image_size}, expected a multiple of {self.factor}, by which "
                f"{self.name} reduces"
            )
        return image_size // self.factor

    @torch.no_grad()
    def encode(self, x: Tensor, seed: int, images: Sequence[str], domain: int) -> Tensor:
        """Latents (B,C,h,w) of x (B,3,H,W); ``images``: the SHA-256 of each one's file, of which
        and ``seed`` the noise is a function, in the ``domain`` ENCODE or ENCODE_FLIP of noise."""
        device = self.module.device
        with self._fitting(len(x), "--batch"):
            found = self.module.encode(x.to(device)).latent_dist
        words = torch.tensor([[int(h[:8], 16), int(h[8:16], 16)] for h in images], device=device)
        keys = noise.as_keys([seed]).to(device).expand(len(images))
        z = noise.normals(keys, words[:, 0], words[:, 1], domain, tuple(found.mean.shape[1:]))
        return (found.mean + found.std * z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, scale: float | None = None) -> Tensor:
        """Pictures (B,3,H,W) of latents that carry ``scale``, by default the VAE's own."""
        z = latents.to(self.module.device) / (scale or self.scale) + self.shift
        with self._fitting(len(z), "--vae-batch"):
            return self.module.decode(z).sample

    @contextlib.contextmanager
    def _fitting(self, count: int, option: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"vae: got {count} images at once, too many for the memory of "
                f"{self.module.device}, expected a smaller {option}"
            ) from None


def load_vae(name: str, device: torch.device) -> VAE:
    """The VAE in a directory, which holds it or a pipeline's ``vae``, or of a hub's OWNER/NAME,
    OWNER/NAME/SUBFOLDER. Weights are read from safetensors alone.

    Raises:
        ConfigError: diffusers is missing, nothing there, another kind of model, damaged or missing
            weights, a VAE of another convention than the module's.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(
            "vae: diffusers is not installed, expected: pip install 'fpdm[diffusers]'"
        ) from None
    where, subfolder = _locate(name)
    try:
        config = _quietly(AutoencoderKL.load_config, where, subfolder=subfolder)
        if (kind := config.get("_class_name")) != "AutoencoderKL":
            raise ConfigError(f"vae: got {name}, a {kind}, expected an AutoencoderKL")
        module, told = _quietly(
            AutoencoderKL.from_pretrained, where, subfolder=subfolder, use_safetensors=True,
            output_loading_info=True, low_cpu_mem_usage=False, torch_dtype=torch.float32,
        )  # fmt: skip
    except ConfigError:
        raise
    except Exception as error:  # of diffusers, the hub, JSON, safetensors and torch
        reason = one_line(error)
        hub = " (no directory here; asked of the hub, where a pipeline's is OWNER/NAME/vae)"
        hub = "" if Path(where).is_dir() else hub
        raise ConfigError(f"vae: got {name}, which cannot be loaded{hub}: {reason}") from None
    # diffusers fills what is missing with random numbers and goes on
    wrong = [f"{kind[:-5]} {key}" for kind, keys in told.items() for key in keys]
    if wrong:
        raise ConfigError(
            f"vae: got {name} with {len(wrong)} tensors amiss, expected those of its config: "
            f"{', '.join(wrong[:3])}"
        )
    # channels last: 1.2 and 1.1 times as fast on a CPU (bench/NOTES.md)
    module = module.to(device, memory_format=torch.channels_last)
    return _describe(module.eval().requires_grad_(False), name)


def _locate(name: str) -> tuple[str, str | None]:
    path = Path(name)
    if name and path.is_dir():
        inner = not (path / CONFIG).is_file() and (path / "vae" / CONFIG).is_file()
        return name, "vae" if inner else None
    found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+))?", name)
    if path.exists() or found is None:
        raise ConfigError(
            f"vae: got {name}, expected a directory or a hub's OWNER/NAME, such as "
            "stabilityai/sd-vae-ft-ema"
        )
    return found[1], found[2]


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Without what diffusers says beside its errors, which become one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        return function(*args, **kwargs)
    finally:
        logging.set_verbosity(before)


def _describe(module: Any, name: str) -> VAE:
    config = module.config
    if (config.in_channels, config.out_channels) != (3, 3):
        got = f"{config.in_channels} in, {config.out_channels} out"
        raise ConfigError(f"vae: got {name} of {got}, expected 3 channels of pixels")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ConfigError(f"vae: got {name} with {key}, expected scaling_factor alone")
    if not config.scaling_factor or config.scaling_factor <= 0:
        raise ConfigError(
            f"vae: got {name} with scaling_factor {config.scaling_factor}, expected more than 0"
        )
    return VAE(
        module,
        Path(name).resolve().name if Path(name).is_dir() else name,
        config.latent_channels,
        2 ** (len(config.block_out_channels) - 1),
        float(config.scaling_factor),
        float(config.get("shift_factor") or 0.0),
        tensors_digest(module.named_parameters()),
    )
