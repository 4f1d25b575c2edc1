"""Files: pretrained weights, training checkpoints, images."""
