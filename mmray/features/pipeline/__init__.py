"""Census, analyses, edits and evaluations as one job, described in one file."""
