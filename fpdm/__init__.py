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

__version__ = "0.1.0"
