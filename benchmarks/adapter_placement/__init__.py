"""Simulated fleets with many adapters: placement and routing policies over the same arrivals."""
