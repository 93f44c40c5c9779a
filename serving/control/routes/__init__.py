"""The control plane's routes, one router a file."""
