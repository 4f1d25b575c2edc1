"""Training: state, losses, the loop."""
