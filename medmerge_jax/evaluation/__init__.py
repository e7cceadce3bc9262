"""Predictions of a model, and the metrics over them."""
