"""Prompts as text: tokenizers, emphasis and chunks, prompt files, styles, wildcards. Knows no network."""
