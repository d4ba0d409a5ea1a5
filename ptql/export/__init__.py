"""Finished models in formats of other runtimes."""
