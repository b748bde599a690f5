"""The detector's second opinion on what the language model claims to see, and answers about an embedding that moves."""
