"""A run's pages over its live tables, served to a browser on this machine."""
