"""Tensor-parallel mathematics: mesh, mappings, layers, cross entropy, gradient norm.

Knows torch and nothing above it. With a group of None every piece is its plain PyTorch twin.
"""
