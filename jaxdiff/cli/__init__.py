"""The commands: flags in, calls of the package, files out."""
