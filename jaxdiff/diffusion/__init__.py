"""The mathematics of diffusion: noise schedules, predictions, guidance, schedulers, the loss. Knows no Flax."""
