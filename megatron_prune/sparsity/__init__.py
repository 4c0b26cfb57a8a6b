"""One-shot weight sparsity: methods on matrices, without a model."""
