"""Image-caption data: input formats, columns, images, and how data is cut into shards."""
