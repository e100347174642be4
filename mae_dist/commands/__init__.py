"""Verbs that make no run: data sets, models, weights in and out, checkpoints, replay, the demo."""
