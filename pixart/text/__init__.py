"""Text: tokenizer with limits, and the T5 encoder."""
