"""What trains a network to know what it does not know, beside the loss: synthetic unknowns, and the vote.

``unknowns.scores`` tells unknown inputs from known ones by a trained network; it needs the extra "training".
``FeatureNetwork`` hands a network to other people's detectors. ``UnknownHead`` is a last layer with an output for
"unknown" of its own, for very sparse networks.
"""

from uasparse_kernels.unknowns.errors import UnknownsError
from uasparse_kernels.unknowns.feature_network import FeatureNetwork
from uasparse_kernels.unknowns.head import UnknownHead
from uasparse_kernels.unknowns.patch_shuffle import PatchShuffle, shuffle_patches
from uasparse_kernels.unknowns.vote import Vote

__all__ = ["FeatureNetwork", "PatchShuffle", "UnknownHead", "UnknownsError", "Vote", "shuffle_patches"]
