"""Decides which groups (prompts with completions) each optimizer step uses, and packs them for every rank.

The result is deterministic.
"""
