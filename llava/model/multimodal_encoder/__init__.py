"""Vision towers: images in, patch features out."""
