"""The report: a run's findings as web pages that need nothing but a browser."""
