"""Files of an edit's folder that an evaluation writes."""

EVALUATION_FILE, CAPTIONS_FILE = "evaluation.json", "captions.parquet"
"""In an edit's folder: the measures of its last evaluation, and the captions before and after."""
