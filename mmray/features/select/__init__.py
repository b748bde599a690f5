"""Choose the neurons whose removal takes a noun and leaves others: a second pass over a run's samples."""
