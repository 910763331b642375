"""Fewer bits: which layer gets how many (`scheme`), from what range (`observe`), and a graph that computes so (`graph`)."""
