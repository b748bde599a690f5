"""Image-caption data: where it lies, which columns it has, and how it is cut into shards."""
