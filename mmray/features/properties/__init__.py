"""Properties of neurons: sensitivity, invariance, specificity and causal effect, next to controls."""
