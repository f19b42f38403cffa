"""Fixed Point Diffusion Models: training and sampling engine.

config, recipes       every setting; presets and recipes
model                 FPDM and the DiT baseline; FPDM.from_pretrained, solve, fixed_point_map
diffusion             Diffusion: noise, targets, losses
engine, schedulers    Sampler; Denoiser, under the schedulers of diffusers
solvers, gradients    for any fixed-point map: Anderson, Broyden, spectral radius; S-JFB,
                      implicit and phantom gradients
interop               published weights, exports
train, sample, evaluate, info       commands: python -m fpdm.train --help
"""

import sys

from fpdm import process

__version__ = "0.1.0"

# here, because torch reads it when it is loaded, which the command's own imports do
if process.is_command(sys.argv, sys.orig_argv):
    process.set_threads()
