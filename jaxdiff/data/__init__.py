"""Captioned images: files in, batches out."""
