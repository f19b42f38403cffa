"""Fixed Point Diffusion Models: training and sampling engine."""

__version__ = "0.1.0"
