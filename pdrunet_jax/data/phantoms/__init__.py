"""Synthetic X-rays of long bones with exact masks."""
