"""`python -m pdrunet_jax.evaluate`: scores, confidence intervals, comparison, report."""
