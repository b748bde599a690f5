"""Neurons of a language, a domain or another label: LAPE as published, or by contribution; and their tests."""
