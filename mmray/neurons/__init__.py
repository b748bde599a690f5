"""Which neurons write a concept: scores, ablation, nouns and heat maps, as functions of tensors."""
