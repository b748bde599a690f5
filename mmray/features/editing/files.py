"""Files of an edit's folder."""

FACTS_FILE, ROWS_FILE = "edit.json", "edit.safetensors"
"""The edit itself; the first is written last, so that it marks a complete edit."""
CARD_FILE = "README.md"
"""The edit's model card."""
EVALUATION_FILE, CAPTIONS_FILE = "evaluation.json", "captions.parquet"
"""The measures of its last evaluation, and the captions before and after."""
