"""Data sets: rendered scenes, image folders, games built from them, and the order in which rounds use them."""
