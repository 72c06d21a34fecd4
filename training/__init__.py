"""Optimizers, schedules, data, the training loop and the phases of Xura."""
