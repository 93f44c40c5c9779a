"""The fleet: engine processes on this machine, and what is known of every replica."""
