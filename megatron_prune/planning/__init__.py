"""Decisions: scores, plans, searches for a shape."""
