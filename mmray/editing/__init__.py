"""Edit neurons: what is learnt or computed for their rows of W_out, as values that are applied and undone."""
