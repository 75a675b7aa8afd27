"""The diffusion process, its denoisers and its samplers."""
