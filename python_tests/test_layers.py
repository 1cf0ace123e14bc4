import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import uasparse_kernels as ua

STORAGES = ["packed", "dense"]
BLOCKS = [(1, 1), (3, 1), (3, 3)]


def make_layer(kind, storage, block=(1, 1), sparsity=0.6, **kwargs):
    if kind == "linear":
        return ua.SparseLinear(9, 12, sparsity=sparsity, block=block, storage=storage, **kwargs)
    return ua.SparseConv2d(6, 9, 3, 2, 1, sparsity=sparsity, block=block, storage=storage, **kwargs)


def make_input(kind, *batch, **kwargs):
    return torch.randn(*batch, 9, **kwargs) if kind == "linear" else torch.randn(*batch, 6, 7, 8, **kwargs)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_the_dense_layer_with_the_same_weights(kind, storage, block):
    layer = make_layer(kind, storage, block, dtype=torch.float64)
    dense = layer.to_dense()
    mask = layer.pattern.to_mask()
    assert torch.equal(dense.weight != 0, mask)
    x = make_input(kind, 5, dtype=torch.float64)
    sparse_x, dense_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(sparse_x), dense(dense_x)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(sparse_x.grad, dense_x.grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert layer.weight.grad.shape == layer.weight.shape
    if storage == "packed":
        torch.testing.assert_close(layer.weight.grad, layer.pattern.pack(dense.weight.grad))
    else:
        torch.testing.assert_close(layer.weight.grad, dense.weight.grad * mask)


@pytest.mark.parametrize("padding", ["same", "valid", 0, (2, 1)])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("kernel_size", [3, (2, 3)])
def test_conv_paddings(padding, padding_mode, kernel_size):
    layer = ua.SparseConv2d(4, 6, kernel_size, padding=padding, padding_mode=padding_mode, groups=2, sparsity=0.5)
    dense = layer.to_dense()
    assert (dense.padding, dense.padding_mode, dense.groups) == (layer.padding, padding_mode, 2)
    x = torch.randn(3, 4, 7, 8)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x[0]))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("storage", STORAGES)
def test_from_dense_and_back(kind, storage):
    dense = nn.Linear(9, 12, bias=False) if kind == "linear" else nn.Conv2d(6, 9, 3, dilation=2, bias=False)
    dense.weight.requires_grad_(False)
    dense.eval()
    mask = torch.rand_like(dense.weight) < 0.4
    pattern = ua.SparsityPattern.from_mask(mask)
    layer = (ua.SparseLinear if kind == "linear" else ua.SparseConv2d).from_dense(
        dense, pattern=pattern, storage=storage
    )
    assert layer.storage == storage
    assert layer.bias is None
    assert not layer.training
    assert not layer.weight.requires_grad
    assert layer.pattern is not pattern
    assert torch.equal(layer.to_dense().weight, dense.weight * mask)
    x = make_input(kind, 2)
    dense.weight.data *= mask
    torch.testing.assert_close(layer(x), dense(x))


def initial_cases():
    empty_row = torch.rand(12, 40) < 0.3
    empty_row[3], empty_row[4] = False, torch.arange(40) == 7  # an output without inputs, and one with a single one
    yield "linear", ua.SparsityPattern.from_mask(empty_row)
    yield "linear", ua.SparsityPattern.random((12, 40), 0.3, block=(4, 4))
    yield "conv", ua.SparsityPattern.random((12, 20, 3, 3), 0.2)
    yield "conv", ua.SparsityPattern.random((12, 20, 3, 3), 0.2, block=(2, 1))


def dense_layer(kind):
    return nn.Linear(40, 12) if kind == "linear" else nn.Conv2d(40, 12, 3, groups=2)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "pattern"), [*initial_cases()])
def test_initial_values_follow_the_fan_in(kind, pattern, storage):
    """Uniform within 1 / sqrt(fan_in) of each output; nothing is divided by zero."""
    options = {"pattern": pattern, "storage": storage}
    layer = ua.SparseLinear(40, 12, **options) if kind == "linear" else ua.SparseConv2d(40, 12, 3, groups=2, **options)
    fan_in = pattern.to_mask().flatten(1).sum(1)
    weights = torch.stack([(layer.reset_parameters(), layer.dense_weight())[1].flatten(1) for _ in range(300)])
    assert weights.isfinite().all() and (weights[0].count_nonzero(1) == fan_in).all()
    bound = fan_in.clamp(min=1).rsqrt()
    largest = weights.abs().amax((0, 2))
    assert (largest <= bound * 1.0001).all() and (largest > 0.97 * bound)[fan_in > 0].all()
    inputs = 40 if kind == "linear" else 180
    assert 0.5 * inputs**-0.5 < layer.bias.abs().max() <= inputs**-0.5
    # The variance of an output of inputs of variance 1 is that of the dense layer, 1 / 3.
    torch.testing.assert_close(
        weights.square().sum(2).mean(0)[fan_in > 0], torch.full((12,), 1 / 3)[fan_in > 0], rtol=0.2, atol=0
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("kind", "pattern"), [*initial_cases()])
def test_a_random_pattern_scales_a_dense_layers_values_and_a_given_one_does_not(kind, pattern, storage):
    dense = dense_layer(kind)
    cls = ua.SparseLinear if kind == "linear" else ua.SparseConv2d
    kept = cls.from_dense(dense, pattern=pattern, storage=storage)
    assert torch.equal(kept.dense_weight(), dense.weight * pattern.to_mask())
    drawn = cls.from_dense(dense, sparsity=0.7, block=pattern.block, storage=storage)
    mask = drawn.pattern.to_mask()
    fan_in = mask.flatten(1).sum(1).view(-1, *[1] * (mask.dim() - 1))
    expected = dense.weight * mask * (dense.weight[0].numel() / fan_in.clamp(min=1)).sqrt()
    torch.testing.assert_close(drawn.dense_weight(), expected)
    assert torch.equal(drawn.bias, dense.bias)
    whole = cls.from_dense(dense, sparsity=0.0, storage=storage)
    assert torch.equal(whole.dense_weight(), dense.weight)


@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("target", STORAGES)
@pytest.mark.parametrize("sparsity", [0.6, 0.8])
def test_a_checkpoint_of_another_pattern_and_storage_loads(source, target, sparsity):
    saved = make_layer("linear", source, sparsity=sparsity)
    layer = make_layer("linear", target)
    weight = layer.weight
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    pattern_keys = {f"pattern.{name}" for name in ("layout", "crow", "col", "signature")}
    assert set(saved.state_dict()) == {"weight", "bias"} | pattern_keys
    layer.load_state_dict(torch.load(buffer))
    assert layer.weight is weight
    assert layer.storage == target
    assert layer.pattern.equal(saved.pattern)
    assert torch.equal(layer.dense_weight(), saved.dense_weight())
    x = make_input("linear", 4)
    torch.testing.assert_close(layer(x), saved(x))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_dense_checkpoint_loads_under_the_own_pattern(storage):
    model = nn.Sequential(make_layer("conv", storage), nn.ReLU())
    dense = nn.Sequential(nn.Conv2d(6, 9, 3, 2, 1), nn.ReLU())
    before = copy.deepcopy(model[0].pattern)
    state = dense.state_dict()
    keys = set(state)
    model.load_state_dict(state)
    assert set(state) == keys
    assert model[0].pattern.equal(before)
    assert torch.equal(model[0].dense_weight(), dense[0].weight * before.to_mask())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "other", [lambda: nn.Linear(8, 12), lambda: ua.SparseLinear(8, 12, sparsity=0.5), lambda: nn.Linear(9, 11)]
)
def test_a_checkpoint_of_another_architecture_is_refused_and_changes_nothing(storage, other):
    layer = make_layer("linear", storage)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Expected|size mismatch"):
        layer.load_state_dict(other().state_dict())
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("storage", STORAGES)
def test_copies_pickles_and_averages(storage):
    layer = make_layer("conv", storage)
    x = make_input("conv", 2)
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
        assert torch.equal(copied(x), expected)
    averaged = AveragedModel(layer)
    averaged.update_parameters(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    averaged.update_parameters(layer)
    torch.testing.assert_close(averaged.module.weight, layer.weight - 0.5)
    assert averaged.module.pattern.equal(layer.pattern)


def test_dtype_conversion_and_autocast():
    layer = make_layer("linear", "packed")
    x = make_input("linear", 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert layer.pattern.col.dtype == torch.int32


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("storage", STORAGES)
def test_compiles_without_graph_breaks(kind, storage):
    layer = make_layer(kind, storage)
    x = make_input(kind, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    grad, layer.weight.grad = layer.weight.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(grad, layer.weight.grad)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_packed_model_trains_like_a_dense_stored_one_and_the_reference(block):
    """50 steps of SGD with momentum and weight decay, 90 % sparse: the three end with the same weights."""

    def network():
        torch.manual_seed(5)
        conv, linear = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12 * 6 * 6, 12)
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)

    masks = [
        ua.SparsityPattern.random(shape, 0.1, block=block).to_mask() for shape in ((12, 3, 3, 3), (12, 12 * 6 * 6))
    ]
    models = []
    for storage in STORAGES:
        model = network()
        overrides = {
            str(i): {"pattern": ua.SparsityPattern.from_mask(m, block=block)}
            for i, m in zip((0, 3), masks, strict=True)
        }
        models.append(ua.sparsify(model, 0.9, storage=storage, overrides=overrides))
    reference = network()
    for i, mask in zip((0, 3), masks, strict=True):
        reference[i].weight.data *= mask
        reference[i].weight.register_hook(lambda grad, mask=mask: grad * mask)
    models.append(reference)
    for model in models:
        torch.manual_seed(6)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
        for _ in range(50):
            x, y = torch.randn(16, 3, 6, 6), torch.randint(12, (16,))
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for i in (0, 3):
        weights = [models[0][i].dense_weight(), models[1][i].dense_weight(), models[2][i].weight.detach()]
        assert not torch.allclose(weights[2], network()[i].weight.detach() * masks[i // 3])
        torch.testing.assert_close(weights[0], weights[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[1], weights[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ua.SparseLinear(4, 4), ValueError, "got none"),
        (
            lambda: ua.SparseLinear(4, 4, sparsity=0.5, pattern=ua.SparsityPattern.random((4, 4), 0.5)),
            ValueError,
            "got both",
        ),
        (lambda: ua.SparseLinear(4, 4, sparsity=1.0), ValueError, "sparsity in"),
        (lambda: ua.SparseLinear(4, 4, pattern=ua.SparsityPattern.random((4, 5), 0.5)), ValueError, "pattern of shape"),
        (lambda: ua.SparseLinear(4, 4, sparsity=0.5, storage="csr"), ValueError, "storage"),
        (lambda: ua.SparseConv2d(4, 6, 3, sparsity=0.5, groups=2, block=(2, 2)), ValueError, "block rows"),
        (lambda: ua.SparseConv2d(4, 6, 3, sparsity=0.5, groups=3), ValueError, "divisible"),
        (lambda: ua.SparseLinear(4, 4, sparsity=0.5)(torch.randn(2, 5)), ValueError, r"\[\.\.\., 4\]"),
        (lambda: ua.SparseLinear(4, 4, sparsity=0.5)(torch.randn(2, 4).double()), TypeError, "one dtype"),
        (lambda: ua.SparseConv2d(4, 4, 3, sparsity=0.5)(torch.randn(2, 3, 8, 8)), ValueError, r"\[N, 4, H, W\]"),
        (lambda: ua.SparseConv2d(4, 4, 3, sparsity=0.5)(torch.randn(2, 4, 2, 8)), ValueError, "larger than"),
    ],
)
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_extra_repr_tells_the_sparsity():
    text = repr(make_layer("conv", "packed", (3, 3)))
    assert "blocks 3x3" in text
    assert "storage=packed" in text
    assert "stride=(2, 2)" in text


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 5), (5, 0)])
def test_zero_sizes_are_torchs(storage, inputs, outputs):
    layer = ua.SparseLinear(inputs, outputs, sparsity=0.5, storage=storage)
    x = torch.randn(3, inputs, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, layer.to_dense()(x))
    out.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape and layer.pattern.nnz == 0


@pytest.mark.parametrize(
    "options",
    [{"stride": (2,)}, {"padding": (1,)}, {"dilation": (2,)}, {"padding": "same"}, {"padding": "valid", "stride": 2}],
)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
def test_convolution_arguments_in_every_form_of_torchs(options, kernel):
    torch.manual_seed(1)
    weight, bias = torch.randn(6, 4, *kernel), torch.randn(6)
    pattern = ua.SparsityPattern.random(weight.shape, 0.5)
    for x in (torch.randn(2, 4, 9, 8), torch.randn(4, 9, 8)):
        expected = nn.functional.conv2d(x, weight * pattern.to_mask(), bias, **options)
        torch.testing.assert_close(ua.ops.masked_conv2d(x, pattern.pack(weight), pattern, bias, **options), expected)
    layer = ua.SparseConv2d(4, 6, kernel, sparsity=0.5, **options)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_channels_last_layer_gives_channels_last_outputs(storage):
    layer = ua.SparseConv2d(8, 12, 3, sparsity=0.9, storage=storage)
    x = torch.randn(2, 8, 6, 6)
    expected = layer(x)
    assert expected.is_contiguous()
    for convert in (lambda m: m.to(memory_format=torch.channels_last), lambda m: m.double().float(), copy.deepcopy):
        layer = convert(layer)
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(x), expected)
    assert layer.to(memory_format=torch.contiguous_format)(x).is_contiguous()


@pytest.mark.parametrize(
    "x", [None, [1.0], torch.zeros(3, 8).to_sparse(), torch.nested.nested_tensor([torch.zeros(2, 8)])]
)
def test_what_is_no_dense_tensor_is_refused(x):
    with pytest.raises(TypeError, match="masked_linear: expected"):
        ua.SparseLinear(8, 5, sparsity=0.5)(x)


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_layers_that_share_a_weight_load_another_pattern(storage):
    def make(density):
        pattern = ua.SparsityPattern.random((12, 12), density)
        model = nn.Sequential(*(ua.SparseLinear(12, 12, pattern=pattern, storage=storage) for _ in range(2)))
        model[1].weight = model[0].weight
        return model

    model, other, x = make(0.5), make(0.3), torch.randn(4, 12)
    model.load_state_dict(other.state_dict())
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model(x), other(x))
