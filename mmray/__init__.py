"""mmray."""
