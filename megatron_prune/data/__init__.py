"""Text in: tokenizers, Megatron's .bin/.idx corpora, and windows of text to evaluate on."""
