"""What is seen of a running model: statistics, gradients, removals, moments."""
