"""`python -m pdrunet_jax.data`: dataset folders, batches, augmentation, importers, phantoms."""
