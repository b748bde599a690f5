"""Census, analyses, edits and evaluations as one job, from one file."""
