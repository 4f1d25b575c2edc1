"""A server that draws for many: one engine, and the APIs that other programs speak."""
