"""Commands that make data, train and evaluate; each explains itself with --help."""
