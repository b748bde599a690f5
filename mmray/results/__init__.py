"""Reading a run: tables, queries, rankings, status. Needs neither torch nor ray."""
