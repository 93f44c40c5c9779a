"""Serving: the gateway (data plane), the fleet behind it, and how requests are routed."""
