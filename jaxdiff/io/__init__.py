"""Files: pretrained weights, training checkpoints, pictures."""
