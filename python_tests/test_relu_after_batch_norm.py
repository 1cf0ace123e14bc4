"""nn.ReLU or nn.ReLU6 after a batch norm: one backward for both where nobody sees between them; gradients in place."""

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import uasparse_kernels as ua
from uasparse_kernels import _library

pytestmark = pytest.mark.skipif(not _library.has_kernel_for("batch_norm", "cpu"), reason="no compiled kernel")
FUSED = "ReluAfterBatchNorm"
KINDS = {ua.nn.ReLU: nn.ReLU, ua.nn.ReLU6: nn.ReLU6}
KIND: type[nn.Module] = ua.nn.ReLU  # of the test that runs
CEILING = 1.0  # of a ReLU6 here, so that many meet it


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__, autouse=True)
def relu_kind(request, monkeypatch):
    monkeypatch.setitem(globals(), "KIND", request.param)


def make_relu():
    relu = KIND(inplace=True)
    if isinstance(relu, nn.ReLU6):
        relu.max_val = CEILING
    return relu


def passes(y):
    """Where the ReLU with output ``y`` lets a gradient pass."""
    return (y > 0) & (y < CEILING) if KIND is ua.nn.ReLU6 else y > 0


class Net(nn.Module):
    """relu(batch_norm(x) + alpha * residual), as models write it."""

    def __init__(self, channels, affine=True, kind="add", alpha=1.0):
        super().__init__()
        self.norm, self.relu = ua.nn.BatchNorm2d(channels, affine=affine), make_relu()
        self.kind, self.alpha = kind, alpha

    def forward(self, x, residual=None):
        out = self.norm(x)
        if self.kind == "add_":
            out.add_(residual, alpha=self.alpha)
        elif self.kind == "add":
            out = out + residual
        elif self.kind == "radd":
            out = residual + out
        return self.relu(out)


def is_fused(y):
    return FUSED in y.grad_fn.name()


def torchs(model):
    """The same network with torch's own layers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for ours, other in (*KINDS.items(), (ua.nn.BatchNorm2d, nn.BatchNorm2d)):
            if type(module) is ours:
                module.__class__ = other
    return model


def gradients(model, inputs, dy):
    """Output and gradients, in float64."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = model(*leaves)
    grads = torch.autograd.grad(y, [*leaves, *model.parameters()], dy.to(y.dtype))
    return y, [t.detach().double() for t in (y, *grads)]


def assert_equal_gradients(model, inputs, dy, fused=True):
    double = torchs(model).double()
    y, found = gradients(model, inputs, dy)
    assert is_fused(y) == fused
    _, expected = gradients(double, [t.double() for t in inputs], dy)
    for one, other in zip(found, expected, strict=True):
        scale = 1 + float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 * scale)


def draw(shape, seed):
    """Input, residual and gradient. The gradient is zero where a sum is about zero: there rounding decides."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(3)]


@pytest.mark.parametrize("seed", range(24))
def test_gradients_are_those_of_float64(seed):
    r = random.Random(seed)
    shape = (r.randint(2, 9), r.randint(1, 40), r.randint(1, 20), r.randint(2, 20))
    kind = ["none", "add_", "add", "add_"][seed % 4]
    model = Net(shape[1], affine=r.random() < 0.7, kind=kind, alpha=r.choice([1.0, 0.5]) if kind == "add_" else 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    x, residual, dy = draw(shape, seed)
    inputs = [x] if kind == "none" else [x, residual]
    near = copy.deepcopy(model)
    near.relu = nn.Identity()
    near = near(*inputs)
    dy = torch.where((near.abs() < 1e-4) | ((near - CEILING).abs() < 1e-4), 0, dy)
    assert_equal_gradients(model, inputs, dy)


@pytest.mark.parametrize("shape", [(8, 12, 64, 96), (3, 70, 51, 50)], ids=str)
@pytest.mark.parametrize("kind", ["none", "add_"])
def test_large_maps(shape, kind):
    """Rows that are whole cache lines go past the caches."""
    model, (x, residual, dy) = Net(shape[1], kind=kind), draw(shape, 1)
    twin = torchs(model)
    inputs = [x] if kind == "none" else [x, residual]
    for one, other in zip(gradients(model, inputs, dy)[1], gradients(twin, inputs, dy)[1], strict=True):
        off = (one - other).abs() > 1e-3 * (1 + other.abs())
        assert off.float().mean() < 1e-5  # where rounding decides whether a gradient passes


def test_residual_of_another_shape_and_without_gradient():
    x, residual, dy = draw((4, 6, 5, 7), 3)
    model = Net(6, kind="add_")
    assert_equal_gradients(model, [x, residual[:1, :, :1]], dy)
    y = model(x.requires_grad_(), residual)
    assert is_fused(y) and y.grad_fn.next_functions[4][0] is None
    y.backward(dy)
    # A sum that is larger than the batch norm's output is no residual's.
    small = Net(6, kind="add")(x[:1], residual)
    assert not is_fused(small)
    small.sum().backward()


def test_a_sum_in_another_dtype():
    x, residual, dy = draw((4, 6, 5, 7), 12)
    model = Net(6, kind="add")
    assert_equal_gradients(model, [x, residual.double()], dy, fused=False)
    leaves = [x.requires_grad_(), residual.bfloat16().requires_grad_()]
    y = model(*leaves)
    assert is_fused(y)
    first, second = torch.autograd.grad(y, leaves, dy)
    assert (first.dtype, second.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(second, torch.where(passes(y), dy, 0).bfloat16())


@pytest.mark.parametrize("kind", ["none", "add", "add_"])
def test_whoever_read_before_and_is_gone(kind):
    """As a mean that is printed: its graph is dead when the ReLU comes."""
    x, residual, dy = draw((4, 6, 5, 7), 13)
    model = Net(6, kind=kind)
    model.relu = nn.Sequential(_Reads(), model.relu)
    assert_equal_gradients(model, [x] if kind == "none" else [x, residual], dy)


class _Reads(nn.Module):
    def forward(self, x):
        assert torch.isfinite(x.mean() * 2)
        return x


@pytest.mark.parametrize("kind", ["none", "add_"])
def test_a_batch_norm_that_has_no_backward_left(kind):
    """As with torch's layers, that is an error of a backward, not of the ReLU."""
    x, residual, _ = draw((4, 6, 5, 7), 14)
    model = Net(6, kind="none")

    def relu(y):
        if kind == "add_":
            y += residual
        return model.relu(y)

    hidden = x.requires_grad_() * 1
    y = model.norm(hidden)
    hidden.mul_(2)
    y = relu(y)
    assert not is_fused(y) and bool((y >= 0).all())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = model.norm(x)
    y.sum().backward()
    y = relu(y)
    assert not is_fused(y) and bool((y >= 0).all())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_the_sum_of_two_batch_norms():
    class Down(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.relu = ua.nn.BatchNorm2d(5), ua.nn.BatchNorm2d(5), make_relu()

        def forward(self, x, z):
            out = self.one(x)
            out += self.other(z)
            return self.relu(out)

    x, z, dy = draw((3, 5, 6, 7), 4)
    assert_equal_gradients(Down(), [x, z], dy)


def seen(model, x, residual, how):
    """A call in which somebody sees, or may see, what lies between; what he saw."""
    out = model.norm(x)
    kept = []
    match how:
        case "hook":
            out.register_hook(lambda grad: kept.append(grad.clone()))
        case "changing hook":
            out.register_hook(lambda grad: grad * 2)
        case "retain_grad":
            out.retain_grad()
        case "reader before":
            kept.append(out + 1)
        case "grad_fn":
            kept.append(out.grad_fn)
        case "node hook":
            out.grad_fn.register_hook(lambda *_: None)
        case "pre hook":
            out.grad_fn.register_prehook(lambda grads: tuple(grad if grad is None else grad * 3 for grad in grads))
        case "held":
            held = out
            out = out + residual
            kept.append(held)
        case "changed":
            with torch.no_grad():
                out.mul_(-1)
        case "changed by data":
            out.data.neg_()
        case "sum changed by data":
            out = out.add_(residual)
            out.data.neg_()
        case "scaled":
            out = out.mul_(2)
        case "view":
            out = out[:, 1:]
        case "twice":
            out = out.add_(out)
    y = model.relu(out)
    return y, kept


HOW = [
    "hook",
    "changing hook",
    "retain_grad",
    "reader before",
    "grad_fn",
    "node hook",
    "pre hook",
    "held",
    "scaled",
    "view",
    "twice",
]
UNSEEN = ["changed", "changed by data", "sum changed by data"]  # by autograd  # fmt: skip


@pytest.mark.parametrize("how", HOW + UNSEEN)
def test_whoever_looks_between_sees_what_he_saw(how):
    x, residual, dy = draw((4, 6, 5, 7), 5)
    results = []
    for model in (Net(6), torchs(Net(6))):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y, kept = seen(model, *leaves, how)
        if type(model.relu) in KINDS:
            assert is_fused(y) == (how in UNSEEN)
        loss = (y * dy[:, : y.shape[1]]).sum()
        if how == "reader before":
            loss = loss + (kept[0] * dy).sum()
        if how == "held":
            results.append([*torch.autograd.grad(loss, [kept[0], *leaves, *model.parameters()])])
            continue
        loss.backward()
        results.append([t.grad for t in (*leaves, *model.parameters())])
        results[-1] += [t for t in kept if how == "hook"]
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_hooks_of_modules_see_what_they_saw():
    x, _, dy = draw((4, 6, 5, 7), 6)
    results = []
    for model in (Net(6, kind="none"), torchs(Net(6, kind="none"))):
        kept = []
        model.norm.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output.detach().clone()))
        # Torch does not let a ReLU in place follow a module with a full backward hook: behind one that is not.
        model.relu.inplace = False
        model.norm.register_full_backward_hook(lambda _, i, o, kept=kept: kept.extend([*i, *o]))
        model.relu.register_full_backward_hook(lambda _, i, o, kept=kept: kept.extend([*i, *o]))
        model(x.clone().requires_grad_()).backward(dy)
        results.append(kept)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    forward = Net(6, kind="none")
    forward.norm.register_forward_hook(lambda _, __, output: output * 2)
    assert not is_fused(forward(x.clone().requires_grad_()))


def test_saved_tensors_hooks_and_checkpoints():
    x, residual, dy = draw((4, 6, 5, 7), 7)
    model = Net(6, kind="add_")
    expected = gradients(model, [x, residual], dy)[1]
    counts = {"pack": 0, "unpack": 0}

    def count(name):
        def call(tensor):
            counts[name] += 1
            return tensor

        return call

    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    with torch.autograd.graph.saved_tensors_hooks(count("pack"), count("unpack")):
        y = model(*leaves)
    assert not is_fused(y) and counts["pack"] > 0 and counts["unpack"] == 0
    grads = torch.autograd.grad(y, [*leaves, *model.parameters()], dy)
    for one, other in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    for reentrant in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        model.zero_grad()
        y = checkpoint(model, *leaves, use_reentrant=reentrant)
        y.backward(dy)
        found = [t.detach().double() for t in (y, *(t.grad for t in (*leaves, *model.parameters())))]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_served_is_torchs():
    x, residual, dy = draw((4, 6, 5, 7), 8)
    model = Net(6, kind="add_")
    with torch.no_grad():
        assert not model(x, residual).requires_grad
    with torch.inference_mode():
        model(x, residual)
    for other in (x.double(), x.contiguous(memory_format=torch.channels_last)):
        twin = copy.deepcopy(model).to(other.dtype)
        assert_equal_gradients(twin, [other, residual.to(other.dtype)], dy, fused=False)
    assert_equal_gradients(model.eval(), [x, residual], dy, fused=False)
    leaf = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model.relu(leaf)


def test_a_ceiling_that_is_not_positive_is_refused():
    for ceiling in (0.0, -1.0, float("nan")):
        y = torch.randn(3)
        before = y.clone()
        with pytest.raises(ValueError, match="positive ceiling"):
            torch.ops.uasparse.relu_(y, ceiling)
        assert torch.equal(y, before)


def test_in_place_is_seen_by_all():
    x = torch.randn(4, 6, 5, 7, requires_grad=True)
    norm, relu = ua.nn.BatchNorm2d(6), make_relu()
    out = norm(x)
    version = out._version
    y = relu(out)
    assert y is out and bool((y >= 0).all()) and out._version > version and out.requires_grad and not out.is_leaf
    # Who needs what was there before hears of it, and who needs the output hears of what comes later.
    out = norm(x)
    square = out.square()
    relu(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    out = norm(x)
    out += torch.ones_like(out)
    y = relu(out)
    assert is_fused(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives():
    x, residual, _ = draw((3, 4, 5, 2), 9)
    for kind in ("none", "add_"):
        results = []
        for model in (Net(4, kind=kind), torchs(Net(4, kind=kind)).double()):
            dtype = next(model.parameters()).dtype
            leaves = [t.to(dtype).requires_grad_() for t in ([x] if kind == "none" else [x, residual])]
            wanted = [*leaves, *model.parameters()]
            first = torch.autograd.grad(model(*leaves).sin().sum(), wanted, create_graph=True)
            torch.manual_seed(1)
            along = sum((g * torch.randn(g.shape, dtype=torch.float64).to(dtype)).sum() for g in first)
            results.append(torch.autograd.grad(along, wanted, allow_unused=True))
        for got, want in zip(*results, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * (1 + float(want.abs().max())))


def test_gradients_of_others_are_not_written():
    x, _, dy = draw((4, 6, 5, 7), 10)
    model = Net(6, kind="none")
    given = dy.clone()
    y = model(x.clone().requires_grad_())
    y.retain_grad()
    y.backward(dy)
    assert torch.equal(dy, given) and torch.equal(y.grad, given)

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            kept.append(grad * 2)
            return kept[0]

    for between in (model, model.norm):
        kept = []
        leaf = x.clone().requires_grad_()
        Keeps.apply(between(leaf)).backward(dy)
        assert torch.equal(kept[0], dy * 2)
    # The graph can be gone through again.
    leaf = x.clone().requires_grad_()
    y = model(leaf) * 3
    first, second = (torch.autograd.grad(y, leaf, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    # Two readers, one of whom passes his gradient on as it is.
    leaf = x.clone().requires_grad_()
    out = model.norm(leaf)
    (out + out * 1).backward(dy)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(torchs(model).norm(x.requires_grad_()), x, 2 * dy)[0])


@pytest.mark.parametrize(
    "shape", [(5, 3, 1, 3), (9, 70, 2, 2), (4, 17, 7, 7), (3, 2, 65, 64), (2, 3, 91, 97), (6, 5, 8, 8)]
)
@pytest.mark.parametrize(
    "relu,by_output,ceiling", [(False, False, None), (True, False, None), (True, True, None), (True, True, 0.5)]
)
def test_in_place_is_the_same(shape, relu, by_output, ceiling):
    x, y, dy = draw(shape, sum(shape))
    weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
    saved = torch.ops.uasparse.batch_norm(x, weight, bias, 1e-5)[2]
    output = y.clamp(0, ceiling) if by_output else None
    for mask in (
        [True, True, True, False],
        [True, False, True, relu],
        [False, True, False, relu],
        [False, True, True, False],
    ):
        if relu:
            expected = list(torch.ops.uasparse.batch_norm_relu_backward(dy, x, weight, output, saved, mask, ceiling))
        else:
            expected = [*torch.ops.uasparse.batch_norm_backward(dy, x, weight, saved, mask[:3]), torch.empty(0)]
        over = dy.clone()
        found = list(torch.ops.uasparse.batch_norm_backward_(over, x, weight, output, saved, relu, mask, ceiling))
        place = 3 if mask[3] else 0
        assert torch.equal(over, expected[place] if mask[place] else dy)
        if place == 0:
            assert found[0].numel() == 0
            found[0] = expected[0]
        assert all(torch.equal(a, b) for a, b in zip(found, expected[:3], strict=True))
    with pytest.raises(ValueError, match="contiguous gradient"):
        torch.ops.uasparse.batch_norm_backward_(dy.transpose(0, 1).contiguous().transpose(0, 1), x, weight, output,
                                                saved, relu, [True] * 3 + [False])  # fmt: skip
    with pytest.raises(ValueError, match="a positive ceiling, and an output"):
        torch.ops.uasparse.batch_norm_relu_backward(dy, x, weight, None, saved, [True] * 4, 6.0)
    if not relu:
        with pytest.raises(ValueError, match="without a ReLU"):
            torch.ops.uasparse.batch_norm_backward_(dy, x, weight, None, saved, False, [True] * 4)


def test_sparsify_puts_it_in_and_densify_takes_it_out():
    torchs = KINDS[KIND]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), torchs(inplace=True), nn.Conv2d(8, 8, 3), torchs())
    relu, names = model[2], list(model.state_dict())
    calls = []
    relu.register_forward_hook(lambda *_: calls.append(1))
    ua.sparsify(model, 0.5, exempt=["0"])
    assert model[2] is relu and type(relu) is type(model[4]) is KIND
    assert set(names) <= set(model.state_dict())
    y = model[:3](torch.randn(2, 3, 9, 9))
    assert calls == [1] and is_fused(y)
    assert type(pickle.loads(pickle.dumps(model[4]))) is KIND
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced.eval()(x := torch.randn(2, 3, 9, 9)), model.eval()(x))
    ua.densify(model)
    assert model[2] is relu and type(relu) is type(model[4]) is KINDS[KIND]


def test_compiled():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ua.nn.BatchNorm2d(4), make_relu(), nn.Conv2d(4, 2, 3))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 9, 9)
    for module in (model, compiled):
        module(x).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_transforms():
    relu = make_relu()

    def loss(module, x):
        return module(F.batch_norm(x, None, None, training=True)).square().sum()

    def plain(y):
        return y.clamp(0, CEILING if KIND is ua.nn.ReLU6 else None)

    x = torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(relu, x))(x), torch.func.grad(lambda x: loss(plain, x))(x)
    )


def test_autocast():
    model = Net(6, kind="none")
    x, _, dy = draw((4, 6, 5, 7), 11)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.requires_grad_())
    assert y.dtype == torch.float32 and is_fused(y)
    y.backward(dy)
