"""Pictures of what a run recorded."""
