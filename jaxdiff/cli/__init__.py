"""The commands: flags to calls to files, and errors in one sentence."""
