"""Agents and their parts as tensors and JSON: files that run no code, whoever made them."""
