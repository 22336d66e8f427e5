"""Which loss teaches a language: two pretrained models of different tokenizer families."""
