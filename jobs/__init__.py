"""Jobs to submit to a cluster, one file per command, and the recipe of the demo model."""
