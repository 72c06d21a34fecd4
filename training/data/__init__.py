"""Data to learn from: generated scenes with their questions, and your own through a manifest."""
