"""The report of a run as one HTML file or a folder, made without torch."""
