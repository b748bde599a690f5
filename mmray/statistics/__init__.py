"""Bootstrap and Wilson intervals: images are resampled, not captions."""
