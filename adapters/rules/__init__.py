"""What each engine asks of a LoRA adapter, one file an engine, and what is wrong with an adapter whoever serves it."""
