"""Read and write LabelMe JSON."""
