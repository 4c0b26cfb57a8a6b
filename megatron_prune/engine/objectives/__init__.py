"""What is minimised beside the language-model loss."""
