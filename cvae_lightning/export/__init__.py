"""Trained models as folders that other programs load, and the loader for what only this package can use."""
