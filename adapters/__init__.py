"""LoRA adapters: their registry, compatibility and hot swap. Imports neither serving nor training."""
