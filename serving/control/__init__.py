"""The control plane: adapters, aliases and their placement. Everything that is not inference."""
