"""What an image shows, and which objects a text names: words, ground truth, questions, answers."""
