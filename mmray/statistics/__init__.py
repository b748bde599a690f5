"""Bootstrap and Wilson intervals over images."""
