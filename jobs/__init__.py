"""Jobs to submit to a cluster, one file per command, and the code that made the demo model."""
