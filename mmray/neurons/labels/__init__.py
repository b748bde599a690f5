"""Neurons of a label (a language, a domain, any column): chosen from activity or contributions, and put to the test."""
