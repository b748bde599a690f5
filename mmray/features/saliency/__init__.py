"""Saliency: where in an image a word comes from, by several methods, measured against boxes."""
