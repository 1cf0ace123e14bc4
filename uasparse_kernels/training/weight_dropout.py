"""Random weight dropout on top of the sparse pattern: the random mask of CigL (Lei et al., arXiv 2302.09369).

Algorithm 1 of the paper: in every step a random mask Z, Bernoulli(1 - rate) an active weight, multiplies the weights;
the gradient is that at Z * W and moves only the weights that Z kept; late in training the average of Z * W is the
result. Together with the vote (unknowns/vote.py) this is the arm `cigl`. What differs from the paper: the average takes
as many weights an epoch as the vote does (the paper: one), its learning rate is the vote's, batch norm is estimated
afresh; weight decay and momentum act on all weights, as torch's SGD has it, so that a weight left out by Z still moves
by them; the rate is the text's 10 % (the released program's command for CIFAR-10 has 1 %).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import uasparse_kernels as ua


class WeightDropout:
    """`draw()` draws a new mask; inside `with dropout:` the weights of the sparse layers are multiplied by it.

    A backward pass within the block gives gradients that are zero where the mask is: dL/dW = Z * dL/d(Z * W). Weights
    are restored at its end, bit for bit. With rate 0 nothing happens. The masks come from torch's global generator.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.layers = [m for m in model.modules() if isinstance(m, ua.nn.SparseLayer)] if rate > 0 else []
        self.masks: list[Tensor] = []
        self._kept: list[Tensor] = []

    def draw(self) -> None:
        self.masks = [torch.empty_like(layer.weight).bernoulli_(1 - self.rate) for layer in self.layers]

    @torch.no_grad()
    def __enter__(self) -> None:
        self._kept = [layer.weight.detach().clone() for layer in self.layers]
        for layer, mask in zip(self.layers, self.masks, strict=True):
            layer.weight.mul_(mask)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for layer, mask, weight in zip(self.layers, self.masks, self._kept, strict=True):
            layer.weight.copy_(weight)
            if layer.weight.grad is not None:
                layer.weight.grad.mul_(mask)
        self._kept = []
