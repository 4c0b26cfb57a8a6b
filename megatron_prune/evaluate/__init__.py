"""Judging a model: what a number means, apart from how it is computed (`engine`)."""
