"""Recipes on top of `uasparse_kernels`: data, networks, sparse training, the vote, and how to judge the result.

Thin by intent: everything here can be replaced by a user's own loop. `python -m training --help` is the entrance.
The method is that of Lei, Xu, Zhang and Mallick, "Embracing Unknown Step by Step", arXiv 2403.20047.
"""
