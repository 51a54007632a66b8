"""X-rays drawn from closed bone surfaces, with an exact mask of each bone."""
