"""Jobs on the runs of a census: properties, edits and their evaluation, saliency, …, and the pipeline of them."""
