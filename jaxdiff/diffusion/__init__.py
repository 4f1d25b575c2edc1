"""The mathematics of diffusion: noise schedules, predictions, guidance, schedulers, losses. Knows no Flax."""
