"""The tokenizer's endpoints: tokenize, detokenize, and what the model's tokenizer is."""
