"""Measuring a model on what no training saw: answers beside priors and controls, classes, retrieval, words, health.

Each job is a file: ``answers``, ``classes``, ``retrieval``, ``words``, ``health``, and ``agent`` for doubt, tools and
injection.  What they share is in ``answering``; ``material`` says which rows are measured.  Every result is a dict
of numbers and texts; a measured share is a *cell*, {"value", "low", "high", "count", "pictures"}, whose interval
comes from resampling whole pictures, because questions about one picture stand and fall together.
"""
