"""Shared by all commands: console, options, progress bars and configuration files."""
