"""What a model is, apart from where it lies: sizes, axes, layout, costs."""
