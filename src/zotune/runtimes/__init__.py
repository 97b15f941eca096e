"""Runtimes: what executes scoring and updates where the tensors live."""
