"""Image generators: pretrained on drawn pictures, then fine-tuned by rewards."""
