"""What an edit changes and leaves alone: measures before and after, with protocol, n and interval."""
