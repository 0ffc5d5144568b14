"""Data sets in Minari's format, with the simulator's scenes, and the page that shows them."""
