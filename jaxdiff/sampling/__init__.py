"""From prompts and other arguments to images. Knows no file."""
