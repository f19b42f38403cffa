"""Fixed Point Diffusion Models: training and sampling engine.

    import fpdm
    model = fpdm.FPDM.from_pretrained(directory)        # or fpdm.load_official(path)
    out, solution, stats = model.solve(x, t, y, iters=8)
    source = fpdm.load_source(directory)                # of a run or an export, with its settings
    sampler = fpdm.Sampler(model, source.diffusion, fpdm.SamplerConfig(steps=20, iters=4))

Everything in ``__all__`` is loaded when it is first asked for. Where it and the rest lives:

config, recipes       every setting; presets and recipes
model                 FPDM and the DiT baseline; FPDM.from_pretrained, solve, fixed_point_map
diffusion             Diffusion: noise, targets, losses
engine, schedulers    Sampler; Denoiser, under the schedulers of diffusers
solvers, gradients    for any fixed-point map: Anderson, Broyden, spectral radius; S-JFB,
                      implicit and phantom gradients
weights               PreparedWeights: cast or folded once, for many calls
pretrained            load_source: model, diffusion and sampler settings of a run or an export
interop               published weights, exports
train, sample, evaluate, info       commands: python -m fpdm.train --help
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fpdm import process

__version__ = "0.1.0"

# here, because torch reads it when it is loaded, which the command's own imports do
if process.is_command(sys.argv, sys.orig_argv):
    process.set_threads()

if TYPE_CHECKING:
    from fpdm import gradients, solvers
    from fpdm.config import DiffusionConfig, ExecutionConfig, ModelConfig, SamplerConfig
    from fpdm.diffusion import Diffusion
    from fpdm.engine import Sampler, Samples
    from fpdm.gradients import Gradient
    from fpdm.interop import load_official
    from fpdm.model import FPDM, DiT
    from fpdm.pretrained import load_source
    from fpdm.schedulers import Denoiser, make_scheduler
    from fpdm.weights import PreparedWeights

__all__ = [
    "FPDM", "Denoiser", "DiT", "Diffusion", "DiffusionConfig", "ExecutionConfig", "Gradient",
    "ModelConfig", "PreparedWeights", "Sampler", "SamplerConfig", "Samples", "__version__",
    "gradients", "load_official", "load_source", "make_scheduler", "solvers",
]  # fmt: skip

# module -> the names that it gives
_HOMES = {
    "config": ("DiffusionConfig", "ExecutionConfig", "ModelConfig", "SamplerConfig"),
    "diffusion": ("Diffusion",),
    "engine": ("Sampler", "Samples"),
    "gradients": ("Gradient",),
    "interop": ("load_official",),
    "model": ("FPDM", "DiT"),
    "pretrained": ("load_source",),
    "schedulers": ("Denoiser", "make_scheduler"),
    "weights": ("PreparedWeights",),
}

if not TYPE_CHECKING:  # to a type checker this would say that every name exists

    def __getattr__(name: str) -> Any:
        """A public name on its first use (PEP 562)."""
        if name in ("gradients", "solvers"):
            return import_module(f"fpdm.{name}")
        for home, names in _HOMES.items():
            if name in names:
                # kept: the next use finds it without this function
                globals()[name] = getattr(import_module(f"fpdm.{home}"), name)
                return globals()[name]
        raise AttributeError(f"module 'fpdm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
