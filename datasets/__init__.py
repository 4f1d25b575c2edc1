"""Scripts that build training data. Not part of the installed package: run them from the checkout."""
