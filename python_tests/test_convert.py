import copy
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import uasparse_kernels as ua
from uasparse_kernels.topology import layer_densities


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(12, 24, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(24, 48, 1))
        self.head = nn.Linear(48, 12)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}


@pytest.mark.parametrize("distribution", ["erk", "er", "uniform"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("exempt", [(), ("stem",)])
def test_sparsify_keeps_the_exact_count_and_knows_the_first_convolution(exempt, distribution, sparsity):
    """By ER and ERK it is within the budget, by "uniform", or exempt, it is dense and outside of it."""
    model = Network()
    outside = bool(exempt) or distribution == "uniform"
    counted = [model.body[0], model.body[2], model.head, *([] if outside else [model.stem])]
    total = sum(m.weight.numel() for m in counted)
    assert ua.sparsify(model, sparsity, distribution=distribution, exempt=exempt) is model
    layers = sparse_layers(model)
    assert type(model.stem) is nn.Conv2d or not outside
    kept = sum(m.pattern.nnz for m in layers.values())
    dense = sum(
        m.weight.numel()
        for n, m in model.named_modules()
        if type(m) in (nn.Linear, nn.Conv2d) and not (n == "stem" and outside)
    )
    assert kept + dense == round((1 - sparsity) * total)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 12)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300), st.sampled_from([(), (1, 1), (3, 3)])), min_size=1),
    st.floats(0.02, 1.0),
    st.sampled_from(["erk", "er", "uniform"]),
)
def test_densities_add_up(shapes, density, distribution):
    shapes = {str(i): (*s[:2], *s[2]) for i, s in enumerate(shapes)}
    densities = layer_densities(shapes, density, distribution)
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    counts = {n: densities[n] * sizes[n] for n in shapes}
    assert all(abs(c - round(c)) < 1e-6 * max(1, c) for c in counts.values())
    assert all(1 / sizes[n] * 0.999 <= d <= 1 for n, d in densities.items())
    assert sum(round(c) for c in counts.values()) == max(len(shapes), round(density * sum(sizes.values())))


def test_erk_densities_are_the_papers():
    # Two layers, worked by hand: raw densities (in + out + kh + kw) / (in * out * kh * kw).
    shapes = {"conv": (64, 32, 3, 3), "linear": (200, 100)}
    raw = {"conv": 102 / 18432, "linear": 300 / 20000}
    factor = 0.1 * 38432 / (102 + 300)
    for name, density in layer_densities(shapes, 0.1, "erk").items():
        assert density == pytest.approx(factor * raw[name], abs=1 / 18432)
    er = layer_densities(shapes, 0.1, "er")
    factor = 0.1 * 38432 / (96 / 2048 * 18432 + 300)
    assert er["conv"] == pytest.approx(factor * 96 / 2048, abs=1 / 18432)
    assert er["linear"] == pytest.approx(factor * 300 / 20000, abs=1 / 18432)


@pytest.mark.parametrize("structure", [None, "fan-in", "2:4"])
def test_sparsify_keeps_the_variance_of_outputs(structure):
    dense = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 64))
    values = [dense[i].weight.detach().clone() for i in (0, 1)]
    given = ua.SparsityPattern.random((64, 40), 0.3)
    overrides = {"1": {"pattern": given}}
    model = ua.sparsify(dense, 0.5, distribution="uniform", structure=structure, overrides=overrides)
    mask = model[0].pattern.to_mask()
    factor = (64 / mask.sum(1, keepdim=True)).sqrt()
    torch.testing.assert_close(model[0].dense_weight(), values[0] * mask * factor)
    assert torch.equal(model[1].dense_weight(), values[1] * given.to_mask())


def test_deep_layers_without_normalisation_keep_their_scale():
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(8) for part in (nn.Linear(200, 200, bias=False), nn.ReLU())))
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
    x = torch.randn(500, 200)
    before = model(x).std()
    assert 0.3 < ua.sparsify(model, 0.9)(x).std() / before < 3


def resnet50():
    """Convolutions and classifier of ResNet-50, by name, with the number of positions of each one's output."""
    layers = {"stem": (nn.Conv2d(3, 64, 7, bias=False), 112**2)}
    channels, side = 64, 56
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(blocks):
            name, before = f"{stage}_{block}", side
            side = 56 // 2**stage
            if block == 0:
                layers[name + "_shortcut"] = nn.Conv2d(channels, 4 * width, 1, bias=False), side**2
            layers[name + "_1"] = nn.Conv2d(channels, width, 1, bias=False), before**2
            layers[name + "_2"] = nn.Conv2d(width, width, 3, bias=False), side**2
            layers[name + "_3"] = nn.Conv2d(width, 4 * width, 1, bias=False), side**2
            channels = 4 * width
    return layers | {"fc": (nn.Linear(channels, 1000, bias=False), 1)}


def test_erk_gives_the_published_flops_of_resnet50():
    """Of the RigL paper: FLOPs for inference as a share of the dense network's, batch norm's two an output included."""
    layers = resnet50()
    shapes = {name: tuple(layer.weight.shape) for name, (layer, _) in layers.items()}
    flops = {name: 2 * layer.weight.numel() * positions for name, (layer, positions) in layers.items()}
    norms = sum(2 * layer.weight.shape[0] * positions for layer, positions in layers.values())
    assert len(shapes) == 54 and sum(map(math.prod, shapes.values())) == 25_502_912
    for sparsity, published in ((0.8, 0.42), (0.9, 0.24), (0.95, 0.12), (0.965, 0.09)):
        densities = layer_densities(shapes, 1 - sparsity, "erk")
        sparse = sum(densities[name] * flops[name] for name in shapes)
        assert round((sparse + norms) / (sum(flops.values()) + norms), 2) == published
    model = ua.sparsify(nn.ModuleDict({name: layer for name, (layer, _) in layers.items()}), 0.965)
    densities = {n: d for n, d in densities.items() if d < 1}
    assert {name: layer.pattern.density for name, layer in sparse_layers(model).items()} == pytest.approx(densities)


def test_erk_makes_small_layers_dense_and_sparsify_leaves_them_out():
    shapes = {"small": (4, 4), "large": (500, 500)}
    densities = layer_densities(shapes, 0.05, "erk")
    assert densities["small"] == 1
    assert round(densities["large"] * 250000) == round(0.05 * 250016) - 16
    model = ua.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(500, 500)), 0.95)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], ua.SparseLinear)


def test_an_override_may_name_only_the_block():
    model = ua.sparsify(Network(), 0.75, overrides={"head": {"block": (4, 4)}})
    assert model.head.pattern.block == (4, 4)
    assert model.head.pattern.nnz == 12 * 48 // 4


def test_blocks_are_whole():
    model = ua.sparsify(Network(), 0.8, block=(4, 4))
    for layer in sparse_layers(model).values():
        assert layer.pattern.block == (4, 4)
        assert layer.storage == "packed"
        assert layer.weight.shape == layer.pattern.packed_shape


def test_exempt_overrides_and_filter():
    model = Network()
    pattern = ua.SparsityPattern.random((12, 48), 0.25)
    ua.sparsify(
        model,
        0.9,
        exempt=["body.2"],
        overrides={"stem": 0.5, "head": {"pattern": pattern, "storage": "dense"}},
        filter=lambda name, module: "body" not in name,
    )
    layers = sparse_layers(model)
    assert set(layers) == {"stem", "head"}
    assert layers["stem"].pattern.nnz == 12 * 27 // 2
    assert layers["head"].pattern.equal(pattern)
    assert layers["head"].storage == "dense"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.0}, "sparsity in"),
        ({"sparsity": -0.1}, "sparsity in"),
        ({"sparsity": 0.5, "exempt": ["boddy"]}, "'boddy'"),
        ({"sparsity": 0.5, "overrides": {"body.1": 0.5}}, "Cannot override 'body.1'"),
        ({"sparsity": 0.5, "overrides": {"head": {"sparsity": 0.5, "block": (5, 5)}}}, "divides"),
        ({"sparsity": 0.5, "distribution": "random"}, "distribution"),
        ({"sparsity": 0.5, "storage": "csr"}, "storage"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(kwargs, message):
    model = Network()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        ua.sparsify(model, **kwargs)
    assert list(model.modules()) == before


def test_what_cannot_be_converted_is_said(caplog):
    tied = nn.Linear(8, 8)
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "normed": weight_norm(nn.Linear(8, 8)),
            "tied": tied,
            "tied_too": nn.Linear(8, 8),
            "odd": nn.Linear(9, 8),
            "plain": nn.Linear(8, 8),
        }
    )
    model["tied_too"].weight = tied.weight
    with caplog.at_level(logging.INFO, logger="uasparse_kernels"):
        ua.sparsify(model, 0.5, block=(4, 4), distribution="uniform")
    assert set(sparse_layers(model)) == {"plain", "attention.in_proj", "attention.out_proj"}
    for text in ("normed cannot", "tied_too cannot", "odd stays dense"):
        assert text in caplog.text


def test_densify_gives_the_same_function():
    model = ua.sparsify(Network(), 0.8)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert ua.densify(model) is model
    assert not sparse_layers(model)
    torch.testing.assert_close(model(x), expected)


def test_a_lone_layer_is_returned():
    layer = ua.sparsify(nn.Linear(20, 20), 0.9)
    assert isinstance(layer, ua.SparseLinear)
    assert layer.pattern.nnz == 40
    assert type(ua.densify(layer)) is nn.Linear


def test_a_module_used_under_two_names_is_swapped_once():
    shared = nn.Linear(20, 20)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(20, 20)})
    ua.sparsify(model, 0.9)
    assert isinstance(model["a"], ua.SparseLinear)
    assert model["b"][0] is model["a"]


def test_explain_names_layers_and_kernels():
    model = ua.sparsify(Network(), 0.8)
    model.train()
    rows = ua.explain(model, torch.randn(2, 3, 8, 8))
    assert [row.where for row in rows] == [n for n in ("stem", "body.0", "body.2", "head") if n in sparse_layers(model)]
    assert all(row.kernel in ("cpu", "dense", "reference") and row.reason for row in rows)
    assert model.training
    assert not model._forward_hooks
    pattern = ua.SparsityPattern.random((4, 6), 0.5)
    rows = ua.explain(ua.ops.masked_linear, torch.randn(2, 6).half(), torch.randn(12).half(), pattern)
    assert rows[0].op == rows[0].where == "masked_linear"
    assert rows[0].kernel == "dense"
    assert "float16" in rows[0].reason


def test_backend_info_names_every_op():
    info = ua.backend_info()
    assert info["torch"] == torch.__version__
    assert set(info["backends"]) == {"masked_linear", "masked_conv2d", "prune_grow", "unknown_aware_loss", "batch_norm"}
    assert info["compiled"]
    assert all(devices["cpu"] == "C++" for devices in info["backends"].values())


class Reader(nn.Module):
    """Reads weights of its layers in several ways."""

    def __init__(self):
        super().__init__()
        self.read, self.called, self.nested = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))
        self.by_helper, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)
        self.under_another_name = self.shared.weight
        nn.init.zeros_(self.called.weight)  # no part of the forward

    def forward(self, x):
        assert isinstance(self.called.weight, torch.Tensor) and self.called.weight.dtype == x.dtype
        if self.called.weight is None:
            return x
        return self.helper(nn.functional.linear(self.called(self.nested(x)), self.read.weight))

    def helper(self, x):
        return x @ self.by_helper.weight.T + nn.functional.linear(x, self.under_another_name)


def test_a_layer_whose_weight_the_model_reads_stays_dense(caplog):
    model = Reader()
    x = torch.randn(3, 8)
    with caplog.at_level(logging.WARNING, logger="uasparse_kernels"):
        ua.sparsify(model, 0.5, distribution="uniform")
    assert set(sparse_layers(model)) == {"called", "nested.0"}
    for name in ("read", "by_helper"):
        assert f"{name} cannot be made sparse: the forward of Reader reads its weight" in caplog.text
    assert (
        "shared cannot be made sparse: its weight is shared by shared.weight, under_another_name"
        in "".join(sorted(caplog.text.splitlines()))
        or "its weight is shared by under_another_name, shared.weight" in caplog.text
    )
    with pytest.raises(ValueError, match="Cannot override 'read'"):
        ua.sparsify(Reader(), 0.5, overrides={"read": 0.5})
    expected = model(x)
    torch.testing.assert_close(ua.densify(model)(x), expected)


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("encoder", [False, True])
def test_transformer_encoders_evaluate_as_they_train(storage, encoder):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if encoder else layer
    fast = copy.deepcopy(model).eval()
    ua.sparsify(model, 0.75, distribution="uniform", storage=storage)
    assert len(sparse_layers(model)) == (8 if encoder else 4)
    x, hidden = torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, 4:] = True
    with torch.no_grad():
        expected = model.train()(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=hidden)[~hidden], expected[~hidden])
    ua.densify(model)
    for mine, theirs in zip(model.modules(), fast.modules(), strict=True):
        for name in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert getattr(mine, name, None) == getattr(theirs, name, None)


def test_output_embeddings_stay_dense_unless_named():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 20)

        def get_output_embeddings(self):
            return self.head

    assert set(sparse_layers(ua.sparsify(Language(), 0.5, distribution="uniform"))) == {"body"}
    model = ua.sparsify(Language(), 0.5, distribution="uniform", overrides={"head": 0.5})
    assert set(sparse_layers(model)) == {"body", "head"}


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_hooks_and_attributes_go_along(storage):
    model = nn.Sequential(nn.Linear(8, 6))
    seen = []
    dense = model[0]
    handle = dense.register_forward_hook(lambda *_: seen.append("forward"))
    dense.register_forward_pre_hook(lambda m, args, kwargs: seen.append("before"), with_kwargs=True)
    dense.register_full_backward_hook(lambda *_: seen.append("backward"))
    dense.weight.register_hook(lambda grad: seen.append(tuple(grad.shape)) or grad * 2)
    dense.bias.register_hook(lambda grad: grad * 3)
    dense.weight._no_weight_decay = dense.note = True
    ua.sparsify(model, 0.5, storage=storage)
    mask, x = model[0].pattern.to_mask(), torch.randn(4, 8, requires_grad=True)
    for turn, active in ((lambda m: m, mask), (ua.densify, torch.ones_like(mask))):
        layer = turn(model)[0]
        assert layer.note and layer.weight._no_weight_decay
        seen.clear()
        layer(x).sum().backward()
        assert sorted(map(str, seen)) == sorted(["before", "forward", "backward", "(6, 8)"])
        grad = layer.weight.grad
        grad = layer.pattern.unpack(grad) if grad.shape != mask.shape else grad
        torch.testing.assert_close(grad, 2 * x.detach().sum(0).expand(6, 8) * active)
        torch.testing.assert_close(layer.bias.grad, torch.full((6,), 12.0))
    handle.remove()
    seen.clear()
    model[0](x)
    assert "forward" not in seen


@pytest.mark.parametrize("block", [(0, 0), (2, 3), (1, 4), (4,)])
def test_blocks_that_are_none_are_refused(block):
    with pytest.raises(ValueError, match="Expected a block"):
        ua.sparsify(Network(), 0.5, block=block)


def test_what_changes_nothing_is_said(caplog):
    with pytest.raises(ValueError, match="without"):
        ua.sparsify(nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.LSTM(4, 4)), 0.9)
    ua.sparsify(Network(), 0.9, filter=lambda *_: False)
    assert "No layer was made sparse" in caplog.text and "left out by the filter" in caplog.text


@pytest.mark.parametrize("steps", [1, 2], ids=["armed", "not armed"])
def test_a_densified_model_has_nothing_of_its_topology(steps, caplog):
    model = ua.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), 0.5, distribution="uniform")
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("mine"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=20, delta_t=2)
    for step in range(steps):
        if step:
            topology.step()
        model(torch.randn(4, 8)).sum().backward()
    assert len(model[0]._forward_hooks) == 2
    for dense in (ua.densify(copy.deepcopy(model)), ua.densify(model)):
        seen.clear()
        dense(torch.randn(4, 8)).sum().backward()
        assert [len(layer._forward_hooks) for layer in dense] == [1, 0] and seen == ["mine"]
        assert not any(layer._forward_hooks_with_kwargs for layer in dense)
    assert "not carried over" not in caplog.text


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_tied_sparse_layers_do_not_change(storage):
    a = ua.SparseLinear(8, 8, sparsity=0.5, storage=storage)
    b = ua.SparseLinear(8, 8, pattern=a.pattern, storage=storage)
    b.weight = a.weight
    model, before = nn.Sequential(a, b), a.dense_weight()
    with pytest.raises(ValueError, match="another sparse layer's too"):
        ua.sparsify(model, 0.8)
    assert torch.equal(a.dense_weight(), before) and a.pattern.equal(b.pattern)


class Reused(nn.Module):
    """A layer under three names, two of them of one module."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b, self.layers = self.a, nn.ModuleList([nn.Linear(16, 16), self.a])

    def forward(self, x):
        return self.b(self.layers[1](self.layers[0](self.a(x))))


def test_a_layer_of_several_names_stays_one(tmp_path):
    model, x = ua.sparsify(Reused(), 0.8), torch.randn(3, 16)
    assert isinstance(model.a, ua.nn.SparseLayer) and model.b is model.layers[1] is model.a
    dense = ua.densify(copy.deepcopy(model))
    assert type(dense.a) is nn.Linear and dense.b is dense.layers[1] is dense.a
    torch.testing.assert_close(dense(x), model(x))
    like = ua.sparsify_like(Reused(), model.state_dict())
    like.load_state_dict(model.state_dict())
    assert like.b is like.a and torch.equal(like(x), model(x))
    ua.save_sparse(model, tmp_path / "a")
    for other in (ua.sparsify(Reused(), 0.6), Reused()):
        torch.testing.assert_close(ua.load_sparse(other, tmp_path / "a")(x), model(x))


class Shares(nn.Module):
    """A layer of two names, and a bias of two layers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.decoder = nn.Sequential(self.encoder[0], nn.Linear(16, 16))
        self.bias = nn.Parameter(torch.zeros(16))
        self.decoder[1].bias = self.bias

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_layers_of_several_names_go_by_each():
    model = ua.sparsify(Shares(), 0.5, exempt=["decoder"])
    assert list(sparse_layers(model)) == ["encoder.1"]
    model = ua.sparsify(Shares(), 0.5, exempt=["decoder.0"])
    assert list(sparse_layers(model)) == ["encoder.1", "decoder.1"]
    model = ua.sparsify(Shares(), 0.5, overrides={"decoder": 0.75, "decoder.1": 0.25})
    densities = {name: layer.pattern.density for name, layer in sparse_layers(model).items()}
    assert densities == {"encoder.0": 0.25, "encoder.1": 0.5, "decoder.1": 0.75}
    model = ua.add_sparse_deltas(Shares(), 0.5, exempt=["decoder"])
    assert isinstance(model.encoder[1], ua.SparseDelta) and type(model.encoder[0]) is nn.Linear


def test_what_is_shared_stays_so():
    model = Shares()
    seen = []
    model.bias.register_hook(seen.append)
    for change in (lambda m: ua.sparsify(m, 0.5), ua.densify):
        model = change(model)
        assert model.decoder[1].bias is model.bias and model.decoder[0] is model.encoder[0]
        model(torch.randn(3, 16)).sum().backward()
    assert torch.equal(model.bias.grad, torch.full((16,), 6.0)) and len(seen) == 2
    pattern = ua.SparsityPattern.random((16, 16), 0.5)
    tied = nn.Sequential(*(ua.SparseLinear(16, 16, pattern=pattern) for _ in range(2)))
    tied[1].weight = tied[0].weight
    x = torch.randn(3, 16)
    expected = tied(x)
    dense = ua.densify(tied)
    assert dense[0].weight is dense[1].weight
    torch.testing.assert_close(dense(x), expected)
