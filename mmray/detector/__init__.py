"""The joint model: one vision embedding for an open-vocabulary detector and for the language model."""
