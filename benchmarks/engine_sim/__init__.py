"""A simulated vLLM with a latency model: its API, metrics, prefix cache and KV events, without a model."""
