"""Sparse training inside of other people's trainers: ``integrations.lightning``, ``.transformers``, ``.peft``.

Each needs its package, so none is imported here.
"""
