"""Folding: what a window has learnt goes into the weights, and what their dtype cannot hold is not lost."""
