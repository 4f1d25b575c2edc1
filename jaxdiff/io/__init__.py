"""Files: models and adapters, images, compiled programs."""
