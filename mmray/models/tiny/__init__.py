"""Tiny checkpoints with random weights of every model type that mmray is checked on, built offline."""
