"""Things to try the repository on: the embedded TinyCOCO, and where real data goes."""
