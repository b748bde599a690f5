"""What located neurons mean: properties measured concept by concept, each with its controls."""
