"""What a model sees: one vision embedding for an open-vocabulary detector and the language model, and what follows."""
