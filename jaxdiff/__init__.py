"""Text-to-image diffusion in pure JAX and Flax."""
