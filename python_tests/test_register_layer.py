"""register_layer: timm's own layers, plain subclasses, and registrations that are wrong."""

import copy
import pickle

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, pad_same
from timm.layers import Linear as TimmLinear
from torch import nn

import uasparse_kernels as ua

SparseLayer = ua.nn.SparseLayer


class SparseConv2dSame(ua.SparseConv2d):
    def padded(self, input):
        return pad_same(input, self.kernel_size, self.stride, self.dilation), (0, 0)


class SparseStdConv2d(ua.SparseConv2d):
    """Scaled weight standardisation over the active weights of each output, whose number is its fan-in.

    Over all weights it would take a mean from the absent ones too, which are absent no more then. So this is another
    function than the dense layer's of the masked weight, and it becomes an ``nn.Conv2d`` of the standardised weight.
    """

    weight_gradient = ua.SparseConv2d.weight_gradient

    @classmethod
    def from_dense(cls, module, *, storage, **options):
        layer = super().from_dense(module, storage="packed", **options)
        layer.gain, layer.eps = nn.Parameter(module.gain.detach().clone()), module.eps
        layer.gamma = module.scale * module.weight[0].numel() ** 0.5
        return layer

    def standardised(self):
        pattern = self.pattern
        counts = pattern.crow.diff().long()
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts, output_size=pattern.num_blocks)
        fan_in = counts.clamp(min=1).to(self.weight.dtype)
        mean = self.weight.new_zeros(len(counts)).index_add(0, rows, self.weight) / fan_in
        centred = self.weight - mean[rows]
        variance = self.weight.new_zeros(len(counts)).index_add(0, rows, centred.square()) / fan_in
        scale = self.gain.flatten() * self.gamma * ((variance + self.eps) * fan_in).rsqrt()
        return centred * scale[rows]

    def forward(self, input):
        input, padding = self.padded(input)
        geometry = (self.stride, padding, self.dilation, self.groups)
        return ua.ops.masked_conv2d(input, self.standardised(), self.pattern, self.bias, *geometry)


@torch.no_grad()
def folded(layer):
    dense = layer.to_dense(nn.Conv2d)
    dense.weight.copy_(layer.pattern.unpack(layer.standardised()))
    return dense


@pytest.fixture
def timms():
    """timm's layers are known."""
    made = [
        ua.register_layer(TimmLinear, ua.SparseLinear.from_dense, lambda layer: layer.to_dense(TimmLinear)),
        ua.register_layer(Conv2dSame, SparseConv2dSame.from_dense, lambda layer: layer.to_dense(Conv2dSame)),
        ua.register_layer(ScaledStdConv2d, SparseStdConv2d.from_dense, folded),
    ]
    yield made
    for registration in made:
        registration.remove()


def step(model, x):
    """A step of RigL; afterwards in eval mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=10, delta_t=1)
    for moves in (True, False):  # what has grown is zero, which a file does not tell from absent, until the next step
        model(x).square().mean().backward()
        optimizer.step()
        assert not moves or topology.step()
        optimizer.zero_grad()
        topology.detach()
    return model.eval()


def standardised():
    layers = ScaledStdConv2d(3, 16, 3, stride=2), nn.ReLU(), ScaledStdConv2d(16, 24, 3, groups=2, bias=False)
    for layer in layers[::2]:
        nn.init.uniform_(layer.gain, 0.5, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def same():
    convolutions = Conv2dSame(3, 16, 3, stride=2), nn.ReLU(), Conv2dSame(16, 24, 3, stride=2, groups=2, bias=False)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), TimmLinear(24, 10))


@pytest.mark.parametrize("make", [same, standardised])
def test_networks_of_timms_layers(make, timms, tmp_path):
    torch.manual_seed(0)
    x, exact = torch.randn(2, 3, 13, 16), make is same
    model = make()
    plain, kinds = copy.deepcopy(model), {n: type(m) for n, m in model.named_modules()}
    ua.sparsify(model, 0.8, keep="magnitude", distribution="uniform")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}
    special = [n for n in layers if kinds[n] in (TimmLinear, Conv2dSame, ScaledStdConv2d)]
    result = ua.summary(model)
    assert special and result.covered / result.weights > 0.75
    if exact:  # the masked dense model
        for n, layer in layers.items():
            plain.get_submodule(n).weight.data.copy_(layer.dense_weight())
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), atol=1e-4, rtol=1e-3)
    step(model.train(), x)
    expected = model(x)
    assert set(special) <= {row.where for row in ua.explain(model, x)}
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    ua.save_sparse(model, tmp_path / "model.safetensors")
    again = ua.sparsify(make(), 0.5, distribution="uniform").eval()
    torch.testing.assert_close(ua.load_sparse(again, tmp_path / "model.safetensors")(x), expected)
    torch.testing.assert_close(ua.optimize_for_inference(model, x)(x), expected, atol=1e-4, rtol=1e-3)
    dense = ua.densify(model)
    torch.testing.assert_close(dense(x), expected, atol=1e-4, rtol=1e-3)
    for n in special:
        assert type(dense.get_submodule(n)) is (kinds[n] if exact else nn.Conv2d)


def test_dynamic_padding_grows_where_the_dense_gradient_is_largest(timms):
    torch.manual_seed(0)
    layer = ua.sparsify(Conv2dSame(4, 6, 3, stride=2).double(), 0.7)
    for size in ((2, 4, 9, 10), (1, 4, 8, 7)):
        x = torch.randn(size, dtype=torch.float64)
        dense = layer.to_dense()
        out = layer(x)
        torch.testing.assert_close(out, dense(x))
        grad = torch.randn_like(out)
        dense(x).backward(grad)
        torch.testing.assert_close(layer.weight_gradient(x, grad, 0, 6), dense.weight.grad)


class Plain(nn.Linear):
    """What people write."""

    kept: int
    default_gain = 2.0

    def __init__(self, inputs, outputs, note="mine"):
        super().__init__(inputs, outputs, bias=False)
        self.note = note

    def reset_parameters(self):
        nn.init.normal_(self.weight)


class Buffered(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(1))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Mixed(Doubled, nn.Module):
    pass


class Named(nn.Linear):
    def matrix(self):
        return self.weight


def test_subclasses_without_behaviour_need_no_registration():
    model = ua.sparsify(nn.Sequential(Plain(16, 16, note="his"), nn.ReLU(), Plain(16, 8)), 0.75)
    x = torch.randn(3, 16)
    assert [type(m) for m in model if isinstance(m, SparseLayer)] == [ua.SparseLinear] * 2 and model[0].note == "his"
    expected = model(x)
    dense = ua.densify(copy.deepcopy(model))
    assert type(dense[0]) is Plain and vars(dense[0]).keys() == vars(Plain(2, 2)).keys() and dense[0].note == "his"
    torch.testing.assert_close(dense(x), expected)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Doubled, "defines forward"), (Mixed, "defines forward"), (Named, "matrix"), (Buffered, "it holds scale besides")],
)
def test_those_with_behaviour_stay_dense_and_are_named(cls, reason):
    model = ua.sparsify(nn.ModuleDict({"a": cls(20, 20), "b": nn.Linear(20, 20)}), 0.8)
    assert type(model["a"]) is cls
    (row,) = [row for row in ua.summary(model).rows if row.layer == "a"]
    assert reason in row.dense_because


def test_a_replaced_forward_is_left_alone():
    model = nn.ModuleDict({"a": nn.Linear(20, 20), "b": nn.Linear(20, 20)})
    model["a"].forward = lambda input: input
    ua.sparsify(model, 0.8)
    assert type(model["a"]) is nn.Linear and type(model["b"]) is ua.SparseLinear


def identity(layer, **_):
    return layer


@pytest.mark.parametrize(
    ("cls", "from_dense", "to_dense", "error", "message"),
    [
        (nn.Linear, identity, identity, ValueError, "torch.nn.modules.linear.Linear has a sparse form already"),
        (ua.SparseLinear, identity, identity, ValueError, "Expected a class of dense layers"),
        (torch.Tensor, identity, identity, TypeError, "Expected a class of nn.Module"),
        (nn.Linear(2, 2), identity, identity, TypeError, "Expected a class of nn.Module"),
        (Doubled, None, identity, TypeError, "Expected from_dense to be a function"),
        (Doubled, identity, "same", TypeError, "Expected to_dense to be a function"),
    ],
)
def test_wrong_registrations_are_refused(cls, from_dense, to_dense, error, message):
    with pytest.raises(error, match=message):
        ua.register_layer(cls, from_dense, to_dense)


class SparseDoubled(ua.SparseLinear):
    def forward(self, input):
        return 2 * super().forward(input)


def halved(module, *, sparsity=None, **options):
    return ua.SparseLinear.from_dense(module, sparsity=sparsity / 2, **options)


def widened(module, **options):
    return ua.SparseLinear(module.in_features + 4, module.out_features, **options)


def another(module, *, pattern=None, sparsity=None, **options):
    return ua.SparseLinear.from_dense(module, sparsity=0.75, **options)


@pytest.mark.parametrize(
    ("from_dense", "options", "error", "message"),
    [
        (identity, {}, TypeError, "expected a sparse layer with a pattern, got a Doubled"),
        (halved, {}, ValueError, "expected sparsity 0.75 in blocks .* got 0.375"),
        (widened, {}, ValueError, r"expected a pattern of the weight's shape \(20, 20\), got \(20, 24\)"),
        (another, {"keep": "magnitude"}, ValueError, "expected a layer of the pattern that was given"),
        (SparseDoubled.from_dense, {}, TypeError, "SparseDoubled has a forward of its own"),
    ],
)
def test_what_from_dense_makes_is_checked_before_the_model_changes(from_dense, options, error, message):
    registration = ua.register_layer(Doubled, from_dense, lambda layer: layer.to_dense(Doubled))
    with pytest.raises(ValueError, match="already"):
        ua.register_layer(Doubled, from_dense, identity)
    try:
        model = nn.ModuleDict({"b": nn.Linear(20, 20), "a": Doubled(20, 20)})
        before = list(model.modules())
        with pytest.raises(error, match=message):
            ua.sparsify(model, 0.75, distribution="uniform", **options)
        assert list(model.modules()) == before
    finally:
        registration.remove()


def test_what_was_made_of_a_forgotten_class_says_so():
    registration = ua.register_layer(Named, ua.SparseLinear.from_dense, lambda layer: layer.to_dense(Named))
    layer = ua.sparsify(Named(20, 20), 0.75)
    assert type(ua.densify(layer)) is Named
    with pytest.raises(TypeError, match="Expected a subclass of Linear, got Conv2d"):
        layer.to_dense(nn.Conv2d)
    registration.remove()
    with pytest.raises(ValueError, match=r"Expected .*Named, of which this SparseLinear was made, to be registered"):
        ua.densify(layer)


def test_sparse_deltas_leave_other_layers():
    model = ua.add_sparse_deltas(nn.ModuleDict({"a": nn.Conv1d(8, 8, 3), "b": Plain(20, 20)}), 0.1)
    assert type(model["a"]) is nn.Conv1d and type(model["b"]) is ua.SparseDelta
