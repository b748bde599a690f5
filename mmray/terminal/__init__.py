"""What every command shares: console, options, progress, configuration files."""
