"""Weights to losses: what a search is handed to measure a configuration with."""
