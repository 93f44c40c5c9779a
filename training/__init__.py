"""Training that turns traffic and feedback into adapters. Imported by nothing of serving."""
