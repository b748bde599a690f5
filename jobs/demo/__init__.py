"""The code that made the demo: scenes, captions, the model and the heads of its detector."""
