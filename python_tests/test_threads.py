"""Results are the same bits for any number of threads and callers, also where threads' shares do not come out even."""

import threading

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import _library

pytestmark = pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part")

THREADS = (2, 3, 5, 16)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.no_grad()
def uneven(layer):
    """Zeros in a layer's weight: none in its last rows, nearly all in its first, one row without any."""
    weight = layer.weight
    kept = torch.linspace(0.02, 0.9, len(weight)).view(-1, *[1] * (weight.dim() - 1)) ** 3
    weight *= torch.rand(weight.shape) < kept
    weight[len(weight) // 2] = 0
    return layer


class Tokens(nn.Module):
    """Norm, attention and a linear layer for many rows."""

    def __init__(self, width=96):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            uneven(nn.Linear(width, 3 * width)),
            nn.Linear(width, width),
        )

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, time, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.out(y)


def networks():
    conv = nn.Conv2d
    # One tap with one and several blocks of channels, 3x3, a stride, depthwise, dense weights in fours.
    yield "convolutions", nn.Sequential(
        conv(3, 36, 3, padding=1), nn.ReLU(), uneven(conv(36, 200, 1)), nn.ReLU(), uneven(conv(200, 130, 3, padding=1)),
        nn.SiLU(), uneven(conv(130, 100, 1, 2)), conv(100, 100, 3, padding=1, groups=100), uneven(conv(100, 77, 1)),
    ), (3, 20, 20)  # fmt: skip
    yield "rows", nn.Sequential(uneven(nn.Linear(700, 333)), nn.GELU(), uneven(nn.Linear(333, 500))), (700,)
    yield "tokens", Tokens(), (37, 96)


@pytest.mark.parametrize("network", list(networks()), ids=lambda network: network[0])
def test_serving(network, set_threads):
    _, model, size = network
    optimized = ua.optimize_for_inference(model.eval(), torch.randn(1, *size))
    inputs = [torch.randn(batch, *size) for batch in (1, 3, 40)]
    set_threads(1)
    wanted = [optimized(x) for x in inputs]
    with torch.no_grad():
        for x, y in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    for count in THREADS:
        set_threads(count)
        assert all(torch.equal(optimized(x), y) for x, y in zip(inputs, wanted, strict=True)), f"{count} threads"

    wrong = []

    def call(count):
        torch.set_num_threads(count)
        for x, y in zip(inputs, wanted, strict=True):
            if not torch.equal(optimized(x), y):
                wrong.append(count)

    callers = [threading.Thread(target=call, args=(count,)) for count in (1, 2, 3, 2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


# Batches that tiles of whole images do not divide: seven or two images of 7 x 7 lie side by side, 16 in a vector.
@pytest.mark.parametrize("batch", [5, 8, 37])
@pytest.mark.parametrize("kernel, size, stride", [(1, 7, 1), (1, 14, 1), (3, 7, 1), (3, 14, 1), (3, 9, 2), (1, 8, 2)])
def test_convolution(batch, kernel, size, stride, set_threads):
    layer = ua.nn.SparseConv2d(20, 70, kernel, stride, kernel // 2, sparsity=0.8)
    x = torch.randn(batch, 20, size, size, requires_grad=True)

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    set_threads(1)
    wanted = step()
    exact = nn.functional.conv2d(x, layer.to_dense().weight, layer.bias, stride, kernel // 2)
    torch.testing.assert_close(wanted[0], exact, rtol=1e-4, atol=1e-5)
    for count in THREADS:
        set_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(step(), wanted, strict=True)), f"{count} threads"
