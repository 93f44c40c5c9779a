"""Which replica takes a request: pure functions of a snapshot of the fleet."""
