"""The version of this package."""

VERSION: str = "0.1.0"
