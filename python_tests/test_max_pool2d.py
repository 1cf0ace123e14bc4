"""max_pool2d against torch: values, gradients, which of equal numbers is taken, on random sizes; layer; errors."""

import copy
import pickle
import random

import numpy as np
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


def test_sparsify_turns_it_and_densify_turns_it_back():
    class Own(nn.MaxPool2d):
        pass

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), Own(2), nn.MaxPool2d(2, 2))
    twin, pool, x = copy.deepcopy(model), model[1], torch.randn(2, 3, 20, 22)
    ua.sparsify(model, 0.0, include_dense=True)
    assert [type(m) for m in (model[1], model[3], model[4])] == [ua.nn.MaxPool2d, Own, ua.nn.MaxPool2d]
    assert model[1] is pool and repr(pool) == repr(twin[1])
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), twin(x))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), twin(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(pool))(x), twin[1](x))
    ua.densify(model)
    assert [type(m) for m in model] == [type(m) for m in twin]


def test_transforms_are_torchs():
    x = torch.randn(3, 2, 2, 8, 8)
    pool = ua.nn.MaxPool2d(2)
    torch.testing.assert_close(torch.func.vmap(pool)(x), torch.stack([F.max_pool2d(image, 2) for image in x]))
    ours, torchs = (torch.func.jvp(f, (x[0],), (x[1],)) for f in (pool, lambda t: F.max_pool2d(t, 2)))
    torch.testing.assert_close(ours, torchs)
    y = x[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: pool(t).square(), x[0].double().requires_grad_())
    (grad,) = torch.autograd.grad(pool(y).pow(3).sum(), y, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), y)[0], torch.where(grad != 0, 6 * y, 0))


def test_only_indices_and_integers_are_torchs():
    x = torch.randn(1, 2, 6, 6)
    for one, other in zip(
        ua.nn.MaxPool2d(2, return_indices=True)(x), F.max_pool2d(x, 2, return_indices=True), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(
        ua.nn.MaxPool2d(2)(torch.arange(16).view(1, 1, 4, 4)), F.max_pool2d(torch.arange(16).view(1, 1, 4, 4), 2)
    )


def test_sizes_are_numbers_of_any_kind():
    """Numpy's too, here and for convolutions; of a sequence one or two."""
    x, two, one = torch.randn(1, 3, 8, 8), np.int64(2), np.int64(1)
    torch.testing.assert_close(ua.nn.MaxPool2d(two, two, np.int32(1))(x), F.max_pool2d(x, 2, 2, 1))
    layer = ua.SparseConv2d(3, 4, 3, two, one, sparsity=0.5)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    for size in ((2, 2, 2), ()):
        with pytest.raises(ValueError, match="one number or two"):
            max_pool2d(x, size)
