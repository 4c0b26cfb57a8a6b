"""Learned masks: gates that are trained with the weights, and what becomes of them."""
