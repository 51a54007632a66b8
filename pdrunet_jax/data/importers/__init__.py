"""Importers for datasets of other tools, one module per format."""
