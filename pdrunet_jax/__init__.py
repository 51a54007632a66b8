"""PDR-UNet in JAX: bone segmentation in X-ray images, with PyTorch parity proven number by number."""
