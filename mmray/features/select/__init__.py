"""Selection of neurons whose removal suppresses a noun and keeps others: a second pass over a run's samples."""
