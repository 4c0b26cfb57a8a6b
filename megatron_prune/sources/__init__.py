"""Every way to see one model as another."""
