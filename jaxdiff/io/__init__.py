"""Files: models and adapters, training checkpoints, images."""
