"""Derivatives beyond the first, and those of torch.func, against the references and against dense layers in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import functional
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import uasparse_kernels as ua
from uasparse_kernels.ops._common import forced

BLOCKS = [(1, 1), (3, 1), (2, 2)]
PACKED = pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])


def random(*size, dtype=torch.float64):
    return torch.randn(size, dtype=dtype, requires_grad=True)


def random_weight(pattern, packed):
    dense = torch.randn(pattern.shape, dtype=torch.float64)
    return (pattern.pack(dense) if packed else dense).requires_grad_()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@PACKED
def test_second_derivatives_of_a_linear_layer(block, packed):
    rows, columns, *batch = (int(torch.randint(1, 4, ())) for _ in range(4))
    pattern = ua.SparsityPattern.random((rows * block[0], (columns + 2) * block[1]), 0.6, block=block)
    inputs = random(*batch, pattern.shape[1]), random_weight(pattern, packed), random(pattern.shape[0])
    with forced("cpu"):
        assert torch.autograd.gradgradcheck(lambda x, w, b: ua.ops.masked_linear(x, w, pattern, b), inputs)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@PACKED
def test_second_derivatives_of_a_convolution(block, packed):
    groups = 2 if block == (2, 2) else 3
    out, inp = block[0] * groups, block[1] * int(torch.randint(1, 3, ()))
    pattern = ua.SparsityPattern.random((out, inp, 2, 3), 0.6, block=block)
    height, width = (int(torch.randint(5, 8, ())) for _ in range(2))
    inputs = random(2, inp * groups, height, width), random_weight(pattern, packed), random(out)

    def call(x, w, b):
        return ua.ops.masked_conv2d(x, w, pattern, b, (2, 1), (1, 0), (1, 2), groups)

    with forced("cpu"):
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_of_some_arguments_only(wanted):
    """What was not asked for has no derivative, and does not disturb the others."""
    pattern = ua.SparsityPattern.random((7, 5), 0.4)
    results = []
    for kernel in ("cpu", "reference"):
        torch.manual_seed(1)
        inputs = [random(4, 5), random_weight(pattern, True), random(7)]
        for place, tensor in enumerate(inputs):
            tensor.requires_grad_(place in wanted)
        sources = [inputs[place] for place in wanted]
        with forced(kernel):
            first = torch.autograd.grad(
                ua.ops.masked_linear(inputs[0], inputs[1], pattern, inputs[2]).pow(3).sum(), sources, create_graph=True
            )
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), sources))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["norm", "relu", "residual", "plain"])
def test_second_derivatives_of_batch_norm(kind):
    x, weight, bias, residual = torch.randn(4, 3, 5, 2), torch.randn(3), torch.randn(3), torch.randn(4, 3, 5, 2)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias, residual)]
        used = inputs[: {"plain": 1, "residual": 4}.get(kind, 3)]
        if dtype == torch.float64:
            affine = [None, None] if kind == "plain" else inputs[1:3]
            output = F.batch_norm(inputs[0], None, None, *affine, training=True)
            output = output + inputs[3] if kind == "residual" else output
            output = output if kind in ("norm", "plain") else output.relu()
        elif kind in ("norm", "plain"):
            output = ua.ops.batch_norm(*used, training=True)
        else:
            extra = inputs[3] if kind == "residual" else None
            output = ua.ops.batch_norm_relu(*inputs[:3], training=True, residual=extra)
        first = torch.autograd.grad(output.sin().sum(), used, create_graph=True)
        torch.manual_seed(1)
        along = sum((g * torch.randn(g.shape, dtype=torch.float64).to(dtype)).sum() for g in first)
        results.append(torch.autograd.grad(along, used))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_second_derivatives_of_the_loss(reduction):
    target = torch.tensor([0, 1, 2, 3, 1])
    options = {"unknown_weight": 0.5, "reduction": reduction}
    assert torch.autograd.gradgradcheck(
        lambda logits: ua.ops.unknown_aware_loss(logits, target, 0.7, **options)[0], random(5, 4)
    )


def small_network():
    layers = ua.SparseLinear(7, 9, sparsity=0.6), nn.Tanh(), ua.SparseLinear(9, 3, sparsity=0.4, storage="dense")
    network = nn.Sequential(*layers).double()
    values = tuple(p.detach() for p in network.parameters())
    names = [name for name, _ in network.named_parameters()]
    x = torch.randn(20, 7, dtype=torch.float64)
    return values, lambda *values: functional_call(network, dict(zip(names, values, strict=True)), (x,)).square().sum()


def test_hessians_and_their_products():
    values, loss = small_network()
    with forced("reference"):
        expected = functional.hessian(loss, values)
    along = tuple(torch.randn_like(value) for value in values)
    product = functional.hvp(loss, values, along)[1]
    for row, got in zip(expected, product, strict=True):
        terms = ((h * v).flatten(got.dim()).sum(-1) if h.dim() else h * v for h, v in zip(row, along, strict=True))
        torch.testing.assert_close(got, sum(terms))
    for vectorize in (False, True):
        rows = functional.hessian(loss, values, vectorize=vectorize)
        for got, want in zip(itertools.chain(*rows), itertools.chain(*expected), strict=True):
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.func.hessian(lambda w: loss(w, *values[1:]))(values[0]), expected[0][0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = nn.Sequential(ua.SparseConv2d(3, 6, 3, sparsity=0.6), ua.nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    model.append(ua.SparseLinear(6 * 16, 4, sparsity=0.8))
    results = []
    for through in (lambda x: checkpoint(model, x, use_reentrant=reentrant), model):
        model.zero_grad()
        x = torch.ones(2, 3, 6, 6).mul(torch.arange(6)).requires_grad_()
        through(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@PACKED
def test_per_sample_gradients_and_tangents(kind, packed):
    storage = "packed" if packed else "dense"
    if kind == "linear":
        layer, x = ua.SparseLinear(8, 6, sparsity=0.5, storage=storage), torch.randn(5, 8)
    else:
        layer, x = ua.SparseConv2d(3, 6, 3, sparsity=0.5, storage=storage), torch.randn(5, 3, 6, 5)
    weight = layer.weight.detach()

    def call(weight, x):
        return functional_call(layer, {"weight": weight}, (x,))

    each = vmap(grad(lambda w, sample: call(w, sample[None]).square().sum()), (None, 0))(weight, x)
    for got, sample in zip(each, x, strict=True):
        (want,) = torch.autograd.grad(layer(sample[None]).square().sum(), layer.weight)
        torch.testing.assert_close(got, want)
    tangent = torch.randn_like(weight)
    torch.testing.assert_close(
        jvp(lambda w: call(w, x), (weight,), (tangent,))[1], call(tangent, x) - call(0 * weight, x)
    )


def test_transforms_of_batch_norm_pooling_and_the_loss():
    norm, target = ua.nn.BatchNorm2d(2, track_running_stats=False), torch.tensor([0, 3, 2])

    def loss(x, ops):
        maps = (norm if ops else lambda x: F.batch_norm(x, None, None, norm.weight, norm.bias, True))(x)
        pooled = (ua.ops if ops else F).max_pool2d(maps, 2).flatten(1)
        function = ua.ops.unknown_aware_loss if ops else ua.ops.unknown_aware_loss_reference
        return function(pooled[:, :4], target, 0.7)[0]

    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(grad(lambda x: loss(x, True))(x), grad(lambda x: loss(x, False))(x))
    torch.testing.assert_close(
        jvp(lambda x: loss(x, True), (x,), (x.flip(0),))[1], jvp(lambda x: loss(x, False), (x,), (x.flip(0),))[1]
    )


def test_operations_are_counted():
    linear, conv = ua.SparseLinear(64, 32, sparsity=0.75), ua.SparseConv2d(4, 8, 3, sparsity=0.75, groups=2)
    for layer, x, vectors in ((linear, random(4, 5, 64, dtype=None), 20), (conv, random(2, 4, 8, 7, dtype=None), 60)):
        for kernel, products in (("cpu", 3), ("forward", 1)):
            with FlopCounterMode(display=False) as counter:
                output = layer(x)
                if kernel == "cpu":
                    output.sum().backward()
            assert counter.get_total_flops() == products * 2 * vectors * layer.pattern.nnz


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("sparsity", [0.2, 0.8])
@PACKED
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_batches_of_gradients(kind, sparsity, packed, how):
    options = {"sparsity": sparsity, "storage": "packed" if packed else "dense", "dtype": torch.float64}
    if kind == "linear":
        layer, x = ua.SparseLinear(20, 12, **options), random(32, 20)
    else:
        layer, x = ua.SparseConv2d(8, 12, 3, **options), random(4, 8, 7, 6)
    y = layer(x)
    cotangents, inputs = torch.randn(3, *y.shape, dtype=torch.float64), [x, layer.weight, layer.bias]
    if how == "vmap":
        batched = vmap(lambda v: torch.autograd.grad(y, inputs, v, retain_graph=True))(cotangents)
    else:
        batched = torch.autograd.grad(y, inputs, cotangents, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, inputs, v, retain_graph=True) for v in cotangents]
    for got, *expected in zip(batched, *single, strict=True):
        torch.testing.assert_close(got, torch.stack(expected))
