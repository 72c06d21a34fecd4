"""The commands of the training pipeline, run by path or as ``python -m training.scripts.<name>``."""
