"""batch_norm against its reference in float64 and against torch: values, gradients, statistics, layers, sparsify."""

import copy
import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.ops import batch_norm, batch_norm_reference, batch_norm_relu
from uasparse_kernels.ops.batch_norm import choose

needs_kernel = pytest.mark.skipif(not _library.has_kernel_for("batch_norm", "cpu"), reason="no compiled kernel")
EPS = torch.finfo(torch.float32).eps
# One pixel, less than a vector of any instruction set, more by a rest, several chunks, several channels together.
SHAPES = [
    (2, 1, 1, 1), (9, 3, 1, 1), (130, 37, 1, 1), (4, 5, 2, 2), (300, 2, 3, 5), (1, 1, 1, 2), (1, 4, 4, 4),
    (5, 70, 4, 4), (64, 20, 4, 4), (3, 17, 5, 5), (70, 6, 7, 7), (2, 3, 8, 8), (33, 9, 8, 8), (3, 5, 14, 14),
    (2, 2, 32, 32), (1, 3, 64, 64), (2, 2, 65, 64), (1, 2, 91, 97), (1, 1, 1, 4097), (6, 5), (4, 3, 21),
    (2, 3, 3, 4, 5),
]  # fmt: skip


def draw(shape, seed=0, mean=0.5, std=1.0):
    g = torch.Generator().manual_seed(seed)
    x = (mean + std * torch.randn(shape, generator=g, dtype=torch.float64)).float()
    dy = torch.randn(shape, generator=g)
    weight, bias = torch.randn(shape[1], generator=g), torch.randn(shape[1], generator=g)
    return x, dy, weight, bias


def kernel(x, weight=None, bias=None, running_mean=None, running_var=None, training=True, momentum=0.1, eps=1e-5):
    """The compiled op, whatever the dispatch would choose."""
    output, stats, _ = torch.ops.uasparse.batch_norm(x, weight, bias, eps)
    if running_mean is not None:
        running_mean.lerp_(stats[0], momentum)
        running_var.lerp_(stats[1], momentum)
    return output


def results(function, x, dy, *parameters, **options):
    """Output, gradients (input, weight, bias) and running statistics, in float64."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *parameters)]
    running = [torch.zeros(x.shape[1], dtype=x.dtype), torch.ones(x.shape[1], dtype=x.dtype)]
    output = function(*leaves, *running, True, 0.25, **options)
    grads = torch.autograd.grad(output, [t for t in leaves if t is not None], dy.to(output.dtype))
    return [t.detach().double() for t in (output, *grads, *running)]


def exact(x, dy, *parameters):
    return results(batch_norm_reference, x.double(), dy.double(), *(p if p is None else p.double() for p in parameters))


def assert_near(got, expected, terms=1, size=None):
    """Rounding of results and of sums of ``terms`` products of a size, which is the largest result's unless it is given
    because products cancel.
    """
    assert got.shape == expected.shape
    error = (got - expected).abs()
    bound = 8 * EPS * terms**0.5 * (1 + expected.abs().amax() if size is None else size)
    assert bool((error <= bound).all()), f"error {error.max():.3g} over the bound {bound:.3g}"


def assert_all_near(x, dy, weight, bias):
    """Kernel against reference in float64."""
    got, expected = results(kernel, x, dy, weight, bias), exact(x, dy, weight, bias)
    (output, grad, *grads), (mean, var) = (list(zip(got, expected, strict=True))[a:b] for a, b in ((0, -2), (-2, None)))
    assert_near(*output)
    # dx = weight / deviation * (dy - mean(dy) - normalised * mean(dy * normalised)): of two values nothing is left.
    slope = (1 if weight is None else weight.abs()) / (
        x.double().transpose(0, 1).flatten(1).var(1, correction=0) + 1e-5
    ).sqrt()
    assert_near(*grad, size=(slope.max() * dy.abs().max()))
    for pair in grads:
        assert_near(*pair, terms=x.numel() // x.shape[1])
    assert_near(*mean)
    assert_near(*var)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_matches_reference(shape, affine):
    x, dy, weight, bias = draw(shape, sum(shape))
    if not affine:
        weight = bias = None
    assert_all_near(x, dy, weight, bias)


@needs_kernel
@pytest.mark.parametrize("seed", range(40))
def test_any_shape_matches_reference(seed):
    r = random.Random(seed)
    shape = (r.randint(2, 40), r.randint(1, 70), r.randint(1, 20), r.randint(1, 20))
    x, dy, *parameters = draw(shape, seed, mean=r.choice([0.0, -30.0, 1000.0]), std=r.choice([0.1, 1.0, 30.0]))
    if r.random() < 0.5:  # strides of other layouts, of slices, of expanded gradients
        x = torch.stack([x, x + 1], -1)[..., 0] if r.random() < 0.5 else x.to(memory_format=torch.channels_last)
        dy = dy[..., :1].expand(shape)
    assert_all_near(x, dy, *parameters)


@needs_kernel
@pytest.mark.parametrize("shape", [(64, 3, 4, 4), (33, 4, 14, 14), (2, 2, 91, 97), (600, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("mean,std", [(1e4, 1e-2), (-1e6, 1.0), (1e3, 1e-3)])
def test_a_mean_far_above_the_deviation_costs_no_digits(shape, mean, std):
    x, dy, *parameters = draw(shape, 1, mean, std)
    assert_all_near(x, dy, *parameters)


@needs_kernel
def test_images_of_different_means():
    """What is taken for a mean on the way is far from that of the rest."""
    x, dy, *parameters = draw((40, 3, 16, 16), 2)
    x += 1000 * (torch.arange(40.0) // 20).view(-1, 1, 1, 1)
    x[0] = 0
    assert_all_near(x, dy, *parameters)


@needs_kernel
@pytest.mark.parametrize("shape", [(6, 5, 2, 2), (6, 5, 7, 9)], ids=str)
def test_numbers_whose_squares_overflow(shape):
    x, dy, weight, bias = draw(shape, 3)
    x[:, 2] *= 1e25
    assert_near(results(kernel, x, dy, weight, bias)[0], exact(x, dy, weight, bias)[0])


@needs_kernel
@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (6, 3, 4, 4), (40, 3, 13, 13)], ids=str)
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]], ids=str)
def test_nan_and_infinity_spread_as_in_torch(shape, values):
    x, dy, weight, bias = draw(shape, 4)
    for i, value in enumerate(values):
        x[3 + i, 1, 1, i] = value

    def torchs(x, weight, bias, mean, var, training, momentum):
        return F.batch_norm(x, mean, var, weight, bias, training, momentum)

    got, expected = results(kernel, x, dy, weight, bias), results(torchs, x, dy, weight, bias)
    assert got[0][:, 1].isnan().all() and got[0][:, [0, 2]].isfinite().all()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.isinf(), other.isinf())
    dy[2, 0, 0, 0] = values[0]
    for one, other in zip(
        results(kernel, x, dy, weight, bias)[1:4], results(torchs, x, dy, weight, bias)[1:4], strict=True
    ):
        assert torch.equal(one.isfinite(), other.isfinite())


@needs_kernel
def test_gradients_that_are_not_asked_for():
    for shape in ((9, 5, 3, 3), (9, 5, 9, 9)):
        x, dy, *parameters = draw(shape)
        full = results(kernel, x, dy, *parameters)[1:4]
        for wanted in range(3):
            leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, *parameters))]
            kernel(*leaves).backward(dy)
            assert torch.equal(leaves[wanted].grad.double(), full[wanted])
            assert all(t.grad is None for i, t in enumerate(leaves) if i != wanted)


@needs_kernel
def test_threads_do_not_change_results():
    threads = torch.get_num_threads()
    found = []
    for shape in ((70, 24, 12, 12), (70, 50, 4, 4), (80, 60, 1, 3)):
        x, dy, *parameters = draw(shape)
        try:
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                found.append(results(kernel, x, dy, *parameters))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
        found.clear()


@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck_of_the_reference(affine):
    x, _, *parameters = (t.double().requires_grad_() for t in draw((4, 3, 2, 3)))
    leaves = (x, *parameters) if affine else (x,)
    assert torch.autograd.gradcheck(lambda *t: batch_norm_reference(*t, training=True), leaves)


@needs_kernel
@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(affine):
    x, _, *parameters = (t.requires_grad_() for t in draw((4, 3, 5, 6)))
    arguments = (x, *(parameters if affine else (None, None)), 1e-5)
    torch.library.opcheck(torch.ops.uasparse.batch_norm.default, arguments)


@needs_kernel
def test_choice():
    x, _, *parameters = draw((4, 3, 5, 6))
    statistics = [torch.zeros(3), torch.ones(3)]
    assert choose(x, *parameters, *statistics).kernel == choose(x).kernel == "cpu"
    for other in (
        x.double(),
        x.bfloat16(),
        x.to(memory_format=torch.channels_last),
        x[:, :, ::2],
        x[:0],
        x[:1, :, :1, :1],
    ):
        assert choose(other).kernel == "torch"
    assert choose(x, parameters[0].double()).kernel == choose(x, None, None, statistics[0]).kernel == "torch"
    assert choose(x.to("meta")).kernel == "torch"
    rows = ua.explain(batch_norm, x, training=True)
    assert [(row.op, row.kernel) for row in rows] == [("batch_norm", "cpu")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_op_is_torchs(training, dtype, format):
    x, _, weight, bias = (t.to(dtype) for t in draw((5, 3, 6, 7)))
    x = x.to(memory_format=format)
    ours, torchs = ([torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)] for _ in range(2))
    got = batch_norm(x, weight, bias, *ours, training, 0.3)
    expected = F.batch_norm(x, *torchs, weight, bias, training, 0.3)
    assert got.dtype == expected.dtype and got.stride() == expected.stride()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(
    "arguments,error",
    [
        ((torch.randn(1, 3, 1, 1),), ValueError),
        ((torch.randn(4, 3, 2, 2), torch.ones(4)), RuntimeError),
        ((torch.randn(4, 3, 2, 2), None, None, torch.zeros(2), torch.zeros(2)), RuntimeError),
        ((torch.zeros(4, 3, 2, 2, dtype=torch.int64),), RuntimeError),
    ],
)
def test_errors_are_torchs(arguments, error):
    with pytest.raises(error):
        batch_norm(*arguments, training=True)


@needs_kernel
@pytest.mark.parametrize(
    "arguments,error",
    [
        ((torch.randn(1, 3, 1, 1), None, None), ValueError),
        ((torch.randn(3), None, None), ValueError),
        ((torch.randn(4, 3, 2, 2).double(), None, None), TypeError),
        ((torch.randn(4, 3, 2, 2), torch.ones(4), None), ValueError),
        ((torch.randn(4, 3, 2, 2), None, torch.ones(3).double()), TypeError),
    ],
)
def test_errors_of_the_kernel(arguments, error):
    with pytest.raises(error, match="Expected"):
        torch.ops.uasparse.batch_norm(*arguments, 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_layer_is_torchs(options):
    ours, torchs = ua.nn.BatchNorm2d(6, eps=1e-3, **options), nn.BatchNorm2d(6, eps=1e-3, **options)
    torchs.load_state_dict(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())
    for step in range(4):
        x, dy, *_ = draw((5, 6, 7, 5), step)
        outputs = []
        for layer in (ours, torchs):
            leaf = x.clone().requires_grad_()
            layer(leaf).backward(dy)
            outputs += [layer(x).detach(), leaf.grad]
        torch.testing.assert_close(outputs[:2], outputs[2:])
    for (name, one), (_, other) in zip(ours.state_dict().items(), torchs.state_dict().items(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))
    ours.track_running_stats = torchs.track_running_stats = False
    torch.testing.assert_close(ours.train()(x), torchs.train()(x))
    with pytest.raises(ValueError, match="4D"):
        ours(x[0])


@needs_kernel
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_is_the_same(momentum):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ua.nn.BatchNorm2d(4, momentum=momentum), nn.ReLU())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=momentum is not None)
    for batch in (4, 7):
        x = torch.randn(batch, 3, 9, 9)
        for module in (model, compiled):
            module(x).square().sum().backward()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        for one, other in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(one, other)


def test_autocast():
    layer = ua.nn.BatchNorm2d(4)
    twin = copy.deepcopy(layer)
    twin.__class__ = nn.BatchNorm2d
    for x in (torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = layer(x), twin(x)
        assert got.dtype == expected.dtype == x.dtype
        torch.testing.assert_close(got, expected)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def test_sparsify_turns_batch_norms_and_densify_turns_them_back():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(*network(), nn.ModuleDict({"own": Own(3), "flat": nn.BatchNorm1d(5)}))
    norm, weight = model[4], model[4].weight
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    model[1].eval()
    names = list(model.state_dict())
    ua.sparsify(model, 0.5)
    assert type(norm) is type(model[1]) is ua.nn.BatchNorm2d and model[4] is norm and norm.weight is weight
    assert norm.training and not model[1].training
    assert type(model[-1]["own"]) is Own and type(model[-1]["flat"]) is nn.BatchNorm1d
    assert [n for n in names if n not in model.state_dict()] == []
    norm(torch.randn(2, 16, 3, 3))
    assert seen == [1]
    assert type(pickle.loads(pickle.dumps(model[1]))) is type(copy.deepcopy(norm)) is ua.nn.BatchNorm2d
    ua.densify(model)
    assert type(norm) is nn.BatchNorm2d and model[4] is norm and type(model[1]) is nn.BatchNorm2d


def test_averaged_models_and_fresh_statistics():
    model = ua.sparsify(network(), 0.5)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    data = [torch.randn(6, 3, 8, 8) for _ in range(3)]
    torch.optim.swa_utils.update_bn(data, averaged)
    assert averaged.module[1].num_batches_tracked == 3 and averaged.module[1].momentum == 0.1
    sums = torch.stack([model[0](x).mean((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, sums, rtol=1e-5, atol=1e-6)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(model)[1], nn.SyncBatchNorm)


def test_training_steps_are_those_with_torchs():
    model = ua.sparsify(network(), 0.5)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) is ua.nn.BatchNorm2d:
            module.__class__ = nn.BatchNorm2d
    losses = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        g = torch.Generator().manual_seed(1)
        for _ in range(5):
            x, y = torch.randn(16, 3, 9, 9, generator=g), torch.randint(5, (16,), generator=g)
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[:5], losses[5:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


def relu_results(function, x, dy, weight, bias, residual):
    """Output and gradients (input, weight, bias, residual), in float64."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    output = function(*leaves)
    grads = torch.autograd.grad(output, [t for t in leaves if t is not None], dy.to(output.dtype))
    return [t.detach().double() for t in (output, *grads)]


@needs_kernel
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_relu(shape, with_residual, affine):
    x, dy, weight, bias = draw(shape, seed=3)
    residual = draw(shape, seed=4)[0] if with_residual else None
    if not affine:
        weight = bias = None

    def expected(x, weight, bias, residual):
        output = batch_norm_reference(x, weight, bias, None, None, True)
        return F.relu(output if residual is None else output + residual)

    def ours(x, weight, bias, residual):
        return torch.ops.uasparse.batch_norm_relu(x, weight, bias, residual, 1e-5)[0]

    double = [None if t is None else t.double() for t in (x, dy, weight, bias, residual)]
    # Where the sum is about zero, rounding decides whether the gradient passes: none is asked for there.
    sums = batch_norm_reference(double[0], double[2], double[3], None, None, True)
    sums = sums if residual is None else sums + double[4]
    dy = torch.where(sums.abs() < 1e-4, 0, dy)
    got, wanted = relu_results(ours, x, dy, weight, bias, residual), relu_results(expected, double[0], dy, *double[2:])
    slope = (1 if weight is None else weight.abs()) / (
        x.double().transpose(0, 1).flatten(1).var(1, correction=0) + 1e-5
    ).sqrt()
    assert_near(got[0], wanted[0])
    assert_near(got[1], wanted[1], size=slope.max() * dy.abs().max())
    for pair in list(zip(got, wanted, strict=True))[2:]:
        assert_near(*pair, terms=x.numel() // x.shape[1])


@needs_kernel
def test_relu_layer_and_only_some_gradients():
    x, dy, _, _ = draw((4, 6, 9, 9))
    residual = torch.randn_like(x).requires_grad_()
    layer, plain = ua.nn.BatchNormReLU2d(6), nn.BatchNorm2d(6)
    for training in (True, False):
        layer.train(training), plain.train(training)
        torch.testing.assert_close(layer(x, residual), F.relu(plain(x) + residual))
        torch.testing.assert_close(layer(x), F.relu(plain(x)))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    # The residual's gradient alone: the input and the layer's parameters ask for none.
    layer.train().requires_grad_(False)
    output = layer(x, residual)
    (grad,) = torch.autograd.grad(output, residual, dy)
    assert torch.equal(grad, torch.where(output > 0, dy, 0))
    with pytest.raises(ValueError, match="residual of the input's shape"):
        batch_norm_relu(x, residual=residual[:, :1])


@needs_kernel
def test_relu_opcheck():
    x, _, weight, bias = draw((3, 5, 4, 5))
    for residual in (None, torch.randn_like(x).requires_grad_()):
        arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual, 1e-5)
        torch.library.opcheck(torch.ops.uasparse.batch_norm_relu.default, arguments)


@pytest.mark.parametrize("given", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
def test_gradients_whichever_parameters_are_given(given, frozen):
    x = torch.randn(4, 3, 5, 6)
    grad, results = torch.randn_like(x), []
    values = {name: torch.rand(3) for name in given}
    for call in (batch_norm, lambda x, w, b, *rest: F.batch_norm(x, *rest[:2], w, b, *rest[2:])):
        leaves = {n: v.clone().requires_grad_(n not in frozen) for n, v in values.items()}
        inputs = x.clone().requires_grad_()
        call(inputs, leaves.get("weight"), leaves.get("bias"), None, None, True).backward(grad)
        results.append([inputs.grad, *(leaf.grad for leaf in leaves.values())])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_relu_is_not_lost_to_synchronised_statistics():
    fused = ua.nn.BatchNormReLU2d(3)
    assert (fused.num_features, copy.deepcopy(fused).num_features) == (3, 3) and "3, eps" in repr(fused)
    with pytest.raises(TypeError, match="no ReLU"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(fused))
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(ua.nn.BatchNorm2d(3), ua.nn.ReLU()))
    assert isinstance(plain[0], nn.SyncBatchNorm) and isinstance(plain[1], nn.ReLU)
