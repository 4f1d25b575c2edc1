"""The commands: from flags through calls to files. An error is one sentence."""
