"""max_pool2d against torch: values, gradients, which of equal numbers is taken, on random sizes; layer; errors."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.ops import max_pool2d

needs_kernel = pytest.mark.skipif(not _library.has_kernel_for("max_pool2d", "cpu"), reason="no compiled kernel")


def draw(seed):
    r = random.Random(seed)
    kernel = (r.randint(1, 5), r.randint(1, 5))
    stride = (r.randint(1, 4), r.randint(1, 4))
    padding = (r.randint(0, kernel[0] // 2), r.randint(0, kernel[1] // 2))
    size = [r.randint(max(1, k - 2 * p), 40) for k, p in zip(kernel, padding, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that many are equal.
    x = torch.randint(-3, 3, (r.randint(1, 3), r.randint(1, 4), *size), generator=generator).float()
    x[torch.rand(x.shape, generator=generator) < 0.05] = r.choice([float("nan"), float("-inf"), float("inf"), 0.5])
    return x, kernel, stride, padding


@needs_kernel
@pytest.mark.parametrize("seed", range(80))
def test_as_torch(seed):
    x, kernel, stride, padding = draw(seed)
    output, indices = torch.ops.uasparse.max_pool2d(x, kernel, stride, padding)
    expected, places = F.max_pool2d(x, kernel, stride, padding, return_indices=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, places)


@needs_kernel
def test_gradient_layer_and_opcheck():
    x = torch.randn(2, 3, 17, 23, requires_grad=True)
    layer, plain = ua.nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)
    grad = torch.randn_like(plain(x))
    got, expected = (torch.autograd.grad(module(x), x, grad)[0] for module in (layer, plain))
    assert torch.equal(got, expected)
    # What our kernel does not cover is torch's.
    for other in (x.double(), x[0], x.to(memory_format=torch.channels_last)):
        assert torch.equal(layer(other), plain(other))
    assert torch.equal(max_pool2d(x, 2, ceil_mode=True), F.max_pool2d(x, 2, ceil_mode=True))
    assert torch.equal(max_pool2d(x, 2, dilation=2), F.max_pool2d(x, 2, dilation=2))
    assert torch.equal(max_pool2d(x, (2, 3)), F.max_pool2d(x, (2, 3)))
    torch.library.opcheck(torch.ops.uasparse.max_pool2d.default, (x, (3, 3), (2, 2), (1, 1)))


@needs_kernel
def test_bad_sizes():
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="padding of at most half"):
        max_pool2d(x, 2, padding=2)
    with pytest.raises(ValueError, match="within the padded input"):
        max_pool2d(x, 7)
