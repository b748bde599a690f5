"""What located neurons mean: properties measured concept by concept, each beside its controls."""
