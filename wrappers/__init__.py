"""How what is seen changes: pixels from a simulator's picture, and the distractions upon it."""
