"""Gradient statistics of the base model over a few batches."""
