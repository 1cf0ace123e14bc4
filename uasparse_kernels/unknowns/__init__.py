"""What trains a network to know what it does not know, beside the loss: synthetic unknowns, and the vote.

Scores that tell unknown inputs from known ones, which need the extra "training", are in ``training.scores``.
"""

from uasparse_kernels.unknowns.patch_shuffle import PatchShuffle, shuffle_patches
from uasparse_kernels.unknowns.vote import Vote

__all__ = ["PatchShuffle", "Vote", "shuffle_patches"]
