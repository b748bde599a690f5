"""Train a network that lets a LLaVA see through a detector's tower, and validate it."""
