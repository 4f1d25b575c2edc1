"""Flax modules of the networks. They know no noise, file or device."""
