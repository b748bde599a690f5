"""Weight edits of located neurons: replace a word, suppress it, or reduce hallucinated objects."""
