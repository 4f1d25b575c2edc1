"""Captioned pictures: folders in, batches out."""
