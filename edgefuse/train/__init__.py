"""The recipe: speech in, a trained checkpoint out."""
