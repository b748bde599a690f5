"""The report of a run: one HTML file, made without torch."""
