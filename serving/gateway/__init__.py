"""The data plane: a request's way from a client's socket to a replica and back."""
