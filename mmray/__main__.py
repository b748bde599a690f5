"""`python -m mmray` is the command line."""

from mmray.cli import main

main()
