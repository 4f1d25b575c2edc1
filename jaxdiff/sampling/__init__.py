"""Draw: from prompts, or from arguments of any kind, to images. Knows no file."""
