"""Vision towers: pictures in, patch features out."""
