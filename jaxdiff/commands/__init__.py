"""What sample.py and train.py are made of: flags, files to write, and errors in one sentence."""
