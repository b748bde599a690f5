"""What a model claims and a detector contradicts; and what changes when its embedding is moved (perturb)."""
