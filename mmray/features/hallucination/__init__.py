"""Hallucination: what a model claims and a detector contradicts; perturb: what changes when its embedding is moved."""
