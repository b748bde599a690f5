"""Objects in images and texts: names and synonyms, ground truth, questions, answers."""
