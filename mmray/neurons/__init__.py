"""The science: which neurons write a concept, as pure functions of tensors and tables."""
