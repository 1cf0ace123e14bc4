"""nn.Conv1d and Hugging Face's Conv1D: values and gradients of the dense layer, and all that stands around them."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import uasparse_kernels as ua
from uasparse_kernels import _library

STORAGES = ["packed", "dense"]


def conv1d_cases():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for i in range(24):
        groups, kernel, dilation = (1, 1, 2, 3)[i % 4], draw(1, 5), draw(1, 3)
        mode = ("zeros", "reflect", "replicate", "circular")[draw(0, 3)]
        stride = draw(1, 3)
        padding = draw(0, 2) if stride > 1 or i % 3 else ("same", "valid")[i % 2]
        options = {"padding": padding, "dilation": dilation, "groups": groups, "bias": bool(i % 5)}
        yield (groups * draw(1, 4), groups * draw(1, 5), kernel, stride), options | {"padding_mode": mode}, draw(13, 29)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("sizes", "options", "length"), [*conv1d_cases()])
def test_conv1d_is_the_dense_layer_with_the_same_weights(sizes, options, length, storage):
    layer = ua.SparseConv1d(*sizes, **options, dtype=torch.float64, sparsity=0.4, storage=storage)
    dense = layer.to_dense()
    assert type(dense) is nn.Conv1d and repr(dense) == repr(nn.Conv1d(*sizes, **options))
    assert torch.equal(dense.weight, layer.dense_weight()) and layer.storage == storage
    for shape in ((3, sizes[0], length), (sizes[0], length)):
        x = torch.randn(shape, dtype=torch.float64)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = layer(mine), dense(theirs)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        layer.zero_grad()
        dense.zero_grad()
        out.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(mine.grad, theirs.grad)
        active = dense.weight.grad.unsqueeze(2)
        stored = layer.pattern.pack(active)
        stored = stored if storage == "packed" else layer.pattern.unpack(stored)
        torch.testing.assert_close(layer.weight.grad, stored)
        if options["bias"]:
            torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
        whole = layer.weight_gradient(x, grad, 0, sizes[1])
        torch.testing.assert_close(whole.squeeze(2), dense.weight.grad)
        torch.testing.assert_close(layer.weight_gradient(x, grad, 1, sizes[1]), whole[1:]) if sizes[1] > 1 else None


@pytest.mark.parametrize("block", [(2, 1), (2, 2)])
def test_conv1d_in_blocks(block):
    layer = ua.SparseConv1d(4, 8, 3, groups=2, block=block, sparsity=0.5, dtype=torch.float64)
    x = torch.randn(2, 4, 11, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    weight = layer.weight.detach().requires_grad_()
    call = lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight))
    with pytest.raises(ValueError, match="block rows"):
        ua.SparseConv1d(4, 6, 3, groups=2, block=(2, 1), sparsity=0.5)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("sizes", "block"), [((4, 16, 1), (4, 1)), ((2, 8, 2), (2, 2))])
def test_all_blocks_of_a_conv1d_are_packed_in_the_dense_weights_shape(sizes, block, storage, assign):
    """A checkpoint's shape then does not tell which of the two it is."""

    def make():
        model = nn.Sequential(nn.Conv1d(*sizes))
        return ua.sparsify(model, 0.0, include_dense=True, block=block, storage=storage)

    model, dense = make(), nn.Sequential(nn.Conv1d(*sizes))
    assert model[0].dense_shape == model[0].pattern.packed_shape
    like = ua.sparsify_like(copy.deepcopy(dense), model.state_dict())
    for other in (make(), like):
        other.load_state_dict(model.state_dict(), assign=assign)
        assert other[0].storage == storage and torch.equal(other[0].dense_weight(), model[0].dense_weight())
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model[0].dense_weight(), dense[0].weight)


@pytest.mark.parametrize("shape", [(2, 5, 9), (9, 4), (2, 4, 9, 1), (9,)])
def test_conv1d_says_what_it_expects(shape):
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"\[N, 4, L\]|Dimension"):
        ua.SparseConv1d(4, 6, 3, sparsity=0.5)(torch.randn(shape))


def transposed(inputs, outputs):
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


MAKERS = {"Conv1D": lambda: transposed(12, 12), "Conv1d": lambda: nn.Conv1d(12, 12, 3, padding=1)}
INPUTS = {"Conv1D": (2, 7, 12), "Conv1d": (2, 12, 7)}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", MAKERS)
def test_dense_to_sparse_and_back_with_the_very_values(kind, storage):
    """The weight is square, so that a transposition that is forgotten shows in the values alone."""
    dense = MAKERS[kind]().double().eval()
    dense.bias.requires_grad_(False)
    largest = dense.weight.abs().flatten().topk(round(0.25 * dense.weight.numel())).indices
    mask = torch.zeros(dense.weight.numel()).index_fill_(0, largest, 1).view_as(dense.weight)
    x = torch.randn(INPUTS[kind], dtype=torch.float64)
    sparse = ua.sparsify(copy.deepcopy(dense), 0.75, keep="magnitude", storage=storage)
    assert sparse.storage == storage and not sparse.training
    back = ua.densify(copy.deepcopy(sparse))
    assert type(back) is type(dense) and vars(back).keys() == vars(dense).keys()
    assert torch.equal(back.weight, dense.weight * mask) and torch.equal(back.bias, dense.bias)
    assert not back.bias.requires_grad and back.weight.requires_grad and not back.training
    torch.testing.assert_close(sparse(x), back(x))
    # Scores and checkpoints have the dense weight's shape.
    by_score = ua.sparsify(copy.deepcopy(dense), 0.75, scores={"weight": dense.weight.detach()}, storage=storage)
    assert torch.equal(by_score.dense_weight(), back.weight)
    if storage == "packed":
        pruned = ua.sparsify(copy.deepcopy(sparse), 0.9, scores={"weight": -dense.weight.detach().abs().log()})
        assert pruned.pattern.nnz == round(0.1 * dense.weight.numel())
    other = ua.sparsify(MAKERS[kind]().double(), 0.5)
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other.dense_weight(), back.weight)
    other.load_state_dict(back.state_dict())
    assert torch.equal(other.dense_weight(), back.weight)
    twin = copy.deepcopy(sparse)
    twin.weight.data.zero_()
    twin.load_state_dict(sparse.state_dict(), assign=True)
    assert torch.equal(twin.dense_weight(), back.weight)
    if storage == "dense":  # for the dense layer, too
        MAKERS[kind]().double().load_state_dict(sparse.state_dict(), strict=False)
        assert torch.equal(sparse.state_dict()["weight"], back.weight)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_hook_of_the_dense_weight_sees_its_gradient(kind):
    dense, seen = MAKERS[kind]().double(), []
    dense.weight.register_hook(seen.append)
    x = torch.randn(INPUTS[kind], dtype=torch.float64)
    sparse = ua.sparsify(dense, 0.5)
    sparse(x).square().sum().backward()
    reference = sparse.to_dense()
    reference(x).square().sum().backward()
    mask = sparse.dense_view(sparse.pattern.to_mask())
    (grad, *_) = seen
    torch.testing.assert_close(grad, reference.weight.grad * mask)


class Net(nn.Module):
    """Both, as people use them."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(nn.Conv1d(5, 24, 5, 2, padding=2), nn.GELU(), nn.Conv1d(24, 32, 3, padding="same"))
        self.point, self.deep = nn.Conv1d(32, 32, 1), nn.Conv1d(32, 32, 3, padding=2, dilation=2, groups=2)
        self.fc, self.proj = transposed(32, 128), transposed(128, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = (self.point(self.front(x).relu()) + self.deep(self.front(x))).transpose(1, 2).contiguous()
        return self.head((x + self.proj(nn.functional.gelu(self.fc(x)))).mean(1))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", ["rigl", "set", "gmp"])
def test_training_moves_the_topology_as_the_reference_does(method, storage):
    """RigL grows where the dense model's gradient is largest."""
    torch.manual_seed(0)
    model = ua.sparsify(Net().double(), 0.8, storage=storage, include_dense=True)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}
    assert len(layers) == 7 and ua.summary(model).covered == ua.summary(model).weights
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    topology = ua.DynamicSparsity(model, optimizer, method=method, total_steps=20, delta_t=1)
    x = torch.randn(3, 5, 17, dtype=torch.float64)
    for _ in range(3):
        before = {name: layer.pattern.to_mask() for name, layer in layers.items()}
        dense = ua.densify(copy.deepcopy(model))
        dense(x).square().sum().backward()
        model(x).square().sum().backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        for name, layer in layers.items():
            after = layer.pattern.to_mask()
            grown = after & ~before[name]
            if method != "rigl" or not bool(grown.any()):
                continue
            grad = dense.get_submodule(name).weight.grad
            grad = (layer.pattern_view(grad) if grad.shape != after.shape else grad).abs()
            assert grad[grown].min() >= grad[~after & ~before[name]].max() * (1 - 1e-9)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_files_summary_and_explain(block, tmp_path):
    torch.manual_seed(0)
    model = ua.sparsify(Net(), 0.75, block=block)
    x = torch.randn(2, 5, 20)
    ua.save_sparse(model, tmp_path / "model.safetensors")
    dense = ua.load_sparse(Net(), tmp_path / "model.safetensors")
    torch.testing.assert_close(dense(x), model(x))
    again = ua.sparsify(Net(), 0.5, storage="dense") if block == (1, 1) else copy.deepcopy(model)
    ua.load_sparse(again, tmp_path / "model.safetensors")
    torch.testing.assert_close(again(x), model(x))
    rows = {row.layer: row for row in ua.summary(model).rows}
    assert rows["proj"].shape == (128, 32) and rows["point"].shape == (32, 32, 1)
    assert {row.kind for row in rows.values() if not row.dense_because} >= {"SparseConv1d", "SparseTransposedLinear"}
    calls = {call.where: call.op for call in ua.explain(model, x)}
    assert calls["proj"] == "masked_linear" and calls["deep"] == "masked_conv2d"


@pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part")
@pytest.mark.parametrize("sparse", [True, False])
def test_serving_takes_them_for_convolutions_and_linear_layers(sparse, tmp_path):
    torch.manual_seed(0)
    model = ua.sparsify(Net(), 0.9, distribution="uniform", overrides={"front.0": 0.5}).eval()
    x = torch.randn(4, 5, 20)
    fast = ua.optimize_for_inference(model if sparse else ua.densify(model), x)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast(x[:3]), model(x[:3]), atol=1e-5, rtol=1e-4)
    kernels = {row.layer: row.kernel for row in ua.explain(fast, x)}
    assert {"front.0", "front.2", "point", "deep", "fc", "proj", "head"} <= kernels.keys()
    assert not any(kernels[name].startswith("torch") for name in ("front.2", "point", "deep", "fc", "proj")), kernels
    fast.save(tmp_path / "fast.safetensors")
    assert torch.equal(ua.load_optimized(tmp_path / "fast.safetensors")(x), fast(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_they_trace_and_compile(compiled):
    model, x = ua.sparsify(Net(), 0.8), torch.randn(2, 5, 20)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else torch.fx.symbolic_trace(model)
    torch.testing.assert_close(call(x), model(x))


def test_gpt2_from_a_dense_checkpoint_and_with_its_tied_head(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from uasparse_kernels.integrations.transformers import from_pretrained

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    dense = copy.deepcopy(model)
    ua.sparsify(model, 0.8, keep="magnitude")
    assert ua.summary(model).covered / ua.summary(model).weights > 0.9
    assert model.lm_head.weight is model.transformer.wte.weight
    x = torch.randint(0, 50, (2, 9))
    loss = model(x, labels=x).loss
    loss.backward()
    for storage in STORAGES:
        ua.repack(model, storage=storage)
        model.save_pretrained(tmp_path / storage)
        again = from_pretrained(GPT2LMHeadModel, tmp_path / storage)
        assert type(again.transformer.h[0].attn.c_proj) is ua.nn.SparseTransposedLinear
        assert torch.equal(again(x).logits, model(x).logits)
    back = ua.densify(copy.deepcopy(model))
    torch.testing.assert_close(back(x).logits, model(x).logits)
    for name, layer in dense.named_modules():
        if isinstance(layer, Conv1D):
            mine = back.get_submodule(name)
            assert type(mine) is Conv1D and repr(mine) == repr(layer)
            kept = mine.weight != 0
            assert torch.equal(mine.weight, layer.weight * kept)
