"""What the parity tests share: cases, both sides of a comparison, the error budget."""
