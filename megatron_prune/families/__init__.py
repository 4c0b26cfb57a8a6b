"""Model families: what sets one apart, and its configuration on disk."""
