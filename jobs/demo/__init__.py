"""How the demo was made: scenes, captions, the model and the heads of its detector."""
