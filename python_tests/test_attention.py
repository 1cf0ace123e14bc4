"""nn.MultiheadAttention with sparse projections: the dense module's results, gradients, names and places."""

import copy
import itertools
import logging
import random

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.nn import SparseMultiheadAttention


@pytest.fixture(autouse=True)
def _slow_path():
    """The dense module's fused path for evaluation gives other values for rows that are masked as a whole."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}


def dense_gradients(module):
    """By the dense module's names."""
    twin = copy.deepcopy(module)
    for mine, theirs in zip(twin.parameters(), module.parameters(), strict=True):
        mine.data = torch.zeros_like(mine) if theirs.grad is None else theirs.grad.clone()
    return dict(
        twin.to_dense().named_parameters() if isinstance(twin, SparseMultiheadAttention) else twin.named_parameters()
    )


CASES = list(itertools.product(["self", "memory", "query is key", "three"], range(15)))


@pytest.mark.parametrize("inputs, seed", CASES)
def test_it_is_the_dense_module_with_masked_weights(inputs, seed):
    choose = random.Random(f"{inputs} {seed}")
    torch.manual_seed(seed)
    heads, each, batch, queries, keys = (choose.randint(1, top) for top in (4, 5, 3, 7, 7))
    if seed % 3 == 0:
        heads, batch = heads + 1, batch + 1
    width = heads * each
    flag = lambda: choose.random() < 0.5  # noqa: E731
    other_sizes = inputs == "three" and flag()
    options = {
        "bias": flag(),
        "add_bias_kv": flag(),
        "add_zero_attn": flag(),
        "batch_first": flag(),
        "kdim": choose.randint(1, 9) if other_sizes else None,
        "vdim": choose.randint(1, 9) if other_sizes and flag() else None,
        "dropout": 0.25 if flag() else 0.0,
    }
    storage = choose.choice(["packed", "dense"])
    module = SparseMultiheadAttention(width, heads, **options, sparsity=0.6, storage=storage, dtype=torch.float64)
    for parameter in module.parameters():
        parameter.data.normal_()
    dense = module.to_dense()
    assert type(dense) is nn.MultiheadAttention and set(dense.state_dict()) == set(
        nn.MultiheadAttention(width, heads, **options).state_dict()
    )
    names = ["in_proj"] if not other_sizes else ["q_proj", "k_proj", "v_proj"]
    assert list(sparse_layers(module)) == [*names, "out_proj"]

    by_head = seed % 3 == 0  # a mask for each head of each sample
    batched = by_head or flag()
    if inputs in ("self", "query is key"):
        keys = queries
    sizes = lambda time, width: (  # noqa: E731
        (time, width) if not batched else (batch, time, width) if options["batch_first"] else (time, batch, width)
    )
    tensors = [
        torch.randn(sizes(time, width), dtype=torch.float64, requires_grad=True)
        for time, width in ((queries, width), (keys, module.kdim), (keys, module.vdim))
    ]
    order = {"self": [0, 0, 0], "memory": [0, 1, 1], "query is key": [0, 0, 2], "three": [0, 1, 2]}[inputs]
    call = {"need_weights": flag(), "average_attn_weights": flag()}
    causal = not by_head and flag()
    if by_head or causal or flag():
        whole = not by_head and (causal or flag())
        shape = (queries, keys) if whole else (heads * (batch if batched else 1), queries, keys)
        hidden = torch.ones(shape, dtype=torch.bool).triu(1) if causal else torch.rand(shape) < 0.3
        hidden[..., 0] = False  # a row of which all is hidden has no answer
        call["attn_mask"] = (
            hidden if flag() else torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        )
        call["is_causal"] = causal and queries == keys
    if flag():
        shape = (batch, keys) if batched else (keys,)
        padding = torch.rand(shape) < 0.3
        padding[..., 0] = False
        mask = call.get("attn_mask")
        as_float = mask is not None and mask.is_floating_point()
        call["key_padding_mask"] = torch.randn(shape, dtype=torch.float64) if as_float else padding

    found = []
    for attention in (module, dense):
        attention.train()
        torch.manual_seed(1)
        inner = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        output, weights = attention(*(inner[i] for i in order), **call)
        ((output**2).sum() + (0 if weights is None else (weights**3).sum())).backward()
        found.append((output, weights, [tensor.grad for tensor in inner], dense_gradients(attention)))
    (output, weights, grads, parameters), (expected, expected_weights, expected_grads, expected_parameters) = found
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(grads, expected_grads)
    masks = {name: parameter != 0 for name, parameter in dense.named_parameters()}
    for name, grad in expected_parameters.items():
        torch.testing.assert_close(parameters[name], grad * masks[name], msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(
        module.eval()(*(tensors[i] for i in order), **call), dense.eval()(*(tensors[i] for i in order), **call)
    )


def test_self_attention_is_one_product_and_cross_attention_of_a_decoder_none_too_many():
    model = ua.sparsify(nn.Transformer(16, 2, 1, 1, 24, batch_first=True), 0.5, distribution="uniform").eval()
    assert isinstance(model.decoder.layers[0].multihead_attn, nn.MultiheadAttention)
    x, y = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    calls = [call.where for call in ua.explain(model, x, y)]
    decoder = [name.removeprefix("decoder.layers.0.") for name in calls if name.startswith("decoder")]
    assert decoder == [
        "self_attn.in_proj",
        "self_attn.out_proj",
        *(f"multihead_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        "linear1",
        "linear2",
    ]


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("kind", ["encoder", "norm first", "transformer"])
def test_transformers_of_torch(kind, storage):
    """In training and in evaluation, padded, with torch's fused paths on."""
    torch.backends.mha.set_fastpath_enabled(True)
    torch.manual_seed(0)
    if kind == "transformer":
        model = nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True)
    else:
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=kind == "norm first")
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=kind == "encoder")
    before = copy.deepcopy(model)
    ua.sparsify(model, 0.75, distribution="uniform", storage=storage)
    assert ua.summary(model).covered == ua.summary(model).weights
    hidden = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    x, y = torch.randn(3, 7, 16), torch.randn(3, 4, 16)
    inputs, masks = ((x, y), {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden})
    if kind != "transformer":
        inputs, masks = (x,), {"src_key_padding_mask": hidden}
    seen = slice(None) if kind == "transformer" else ~hidden
    dense = ua.densify(copy.deepcopy(model))
    with torch.no_grad():
        expected = dense.train()(*inputs, **masks)[seen]
        for one in (model.train(), model.eval(), dense.eval()):
            torch.testing.assert_close(one(*inputs, **masks)[seen], expected)
    assert [type(m) for m in dense.modules()] == [type(m) for m in before.modules()]
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in before.named_parameters()]
    for mine, theirs in zip(dense.modules(), before.modules(), strict=True):
        assert {n for n in mine.__dict__ if n != "_clean"} == set(theirs.__dict__)


def test_the_largest_weights_of_a_pretrained_one_stay():
    """By magnitude, by scores of the dense names; its own name stands for all projections."""
    torch.manual_seed(0)
    dense = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3), "other": nn.MultiheadAttention(12, 3, kdim=5)})
    model = ua.sparsify(copy.deepcopy(dense), 0.75, distribution="uniform", keep="magnitude", exempt=["other"])
    assert list(sparse_layers(model)) == ["attention.in_proj", "attention.out_proj"]
    assert type(model["other"]) is nn.MultiheadAttention
    weight = dense["attention"].in_proj_weight
    kept = weight.abs() >= weight.abs().view(-1).sort().values[-108]
    assert torch.equal(model["attention"].to_dense().in_proj_weight, weight * kept)
    scores = {name: torch.rand_like(p) for name, p in dense.named_parameters() if p.dim() == 2}
    model = ua.sparsify(copy.deepcopy(dense), 0.5, scores=scores, overrides={"other": 0.75}, distribution="uniform")
    assert {name: layer.pattern.density for name, layer in sparse_layers(model).items()} == {
        **dict.fromkeys(["attention.in_proj", "attention.out_proj"], 0.5),
        **dict.fromkeys(["other.q_proj", "other.k_proj", "other.v_proj", "other.out_proj"], 0.25),
    }
    best = scores["other.k_proj_weight"] >= scores["other.k_proj_weight"].view(-1).sort().values[-15]
    assert torch.equal(model["other"].k_proj.pattern.to_mask(), best)
    with pytest.raises(ValueError, match="No layer of the model is named 'attentoin'"):
        ua.sparsify(dense, 0.5, exempt=["attentoin"])


def test_a_failure_leaves_the_parameters_themselves():
    model = nn.Transformer(16, 2, 1, 1, 24)
    parameters, modules = list(model.named_parameters()), list(model.named_modules())
    with pytest.raises(ValueError, match="storage"):
        ua.sparsify(model, 0.5, storage="csr")
    ua.sparsify(model, 0.5, filter=lambda name, _: "linear" in name)
    others = [(n, p) for n, p in model.named_parameters() if "linear" not in n]
    assert all(
        a == b and p is q
        for (a, p), (b, q) in zip(others, [x for x in parameters if "linear" not in x[0]], strict=True)
    )
    assert [type(m) for _, m in model.named_modules() if "attn" in _] == [type(m) for n, m in modules if "attn" in n]
    reasons = {row.layer: row.dense_because for row in ua.summary(model).rows if "attn" in row.layer}
    assert len(reasons) == 6 and set(reasons.values()) == {"left out by the filter"}


def test_who_reads_its_weights_keeps_it_dense(caplog):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.called = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.called(x, x, x)[0] @ self.attention.in_proj_weight[:8]

    model, shared = Reader(), nn.MultiheadAttention(8, 2)
    shared.out_proj.weight = nn.MultiheadAttention(8, 2).out_proj.weight
    with caplog.at_level(logging.WARNING, logger="uasparse_kernels"):
        ua.sparsify(model, 0.5, distribution="uniform")
    assert type(model.attention) is nn.MultiheadAttention and type(model.called) is SparseMultiheadAttention
    assert "attention cannot be made sparse: the forward of Reader reads its weights" in caplog.text
    rows = {row.layer: row.dense_because for row in ua.summary(model).rows}
    assert "Reader reads" in rows["attention.in_proj_weight"] and "Reader reads" in rows["attention.out_proj"]
    assert not rows["called.in_proj"] and not rows["called.out_proj"]
    assert {row.dense_because for row in ua.summary(nn.MultiheadAttention(8, 2)).rows} == {"sparsify was not called"}


@pytest.mark.parametrize("kdim", [None, 5])
def test_files_and_states(tmp_path, kdim):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(12, 3, kdim=kdim), nn.Transformer(12, 2, 1, 1, 12)])
    model = ua.sparsify(model, 0.75, distribution="uniform")
    dense = ua.densify(copy.deepcopy(model))
    ua.save_sparse(model, tmp_path / "net.safetensors")
    other = ua.sparsify(ua.densify(copy.deepcopy(model)), 0.5, distribution="uniform")
    for parameter in other.parameters():
        parameter.data.normal_()
    ua.load_sparse(other, tmp_path / "net.safetensors")
    for name, layer in sparse_layers(other).items():
        assert torch.equal(layer.dense_weight(), model.get_submodule(name).dense_weight())
    fresh = copy.deepcopy(dense)
    for parameter in fresh.parameters():
        parameter.data.normal_()
    ua.load_sparse(fresh, tmp_path / "net.safetensors")
    for name, value in dense.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    for state in (model.state_dict(), dense.state_dict()):
        target = copy.deepcopy(model)
        for parameter in target.parameters():
            parameter.data.zero_()
        target.load_state_dict(state)
        for name, value in model.state_dict().items():
            assert torch.equal(target.state_dict()[name], value), name


def test_it_is_made_of_a_dense_one_and_drawn_as_that():
    dense = nn.MultiheadAttention(64, 4, add_bias_kv=True)
    module = SparseMultiheadAttention.from_dense(dense, sparsity=0.5, storage="packed")
    assert type(dense) is nn.MultiheadAttention and module.in_proj.pattern.density == 0.5
    with pytest.raises(TypeError, match=r"Expected an nn\.MultiheadAttention"):
        SparseMultiheadAttention.from_dense(module, sparsity=0.5)
    before = module.out_proj.weight.clone()
    module._reset_parameters()
    deviation = module.in_proj.weight.detach().std() * 0.5**0.5
    torch.testing.assert_close(deviation, dense.in_proj_weight.detach().std(), rtol=0.1, atol=0)
    assert not module.in_proj.bias.any() and torch.equal(module.out_proj.weight, before)


def test_nested_tensors_and_wrong_sizes_are_refused():
    module = SparseMultiheadAttention(8, 2, batch_first=True, sparsity=0.5)
    x = torch.randn(2, 3, 8)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)])
    with pytest.raises(ValueError, match="no nested tensors"):
        module(nested, nested, nested)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        module(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask of shape"):
        module(x, x, x, attn_mask=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="of one batch"):
        module(x, x[:1], x[:1])
    with pytest.raises(ValueError, match="a value for each key"):
        module(x, x, x[:, :2])
    with pytest.raises(ValueError, match="queries of 8"):
        module(x[..., :6], x, x)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4))
    return ua.sparsify(model, 0.75, distribution="uniform", storage="packed")


def test_training_with_a_moving_topology_an_average_and_one_graph():
    results = []
    for compiled in (False, True):
        model = encoder()
        torch.compiler.reset()
        function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(ua.param_groups(model, 0.05), 1e-2)
        topology = ua.DynamicSparsity(model, optimizer, total_steps=8, delta_t=2)
        averaged = ua.AveragedModel(model, decay=0.5)
        assert "0.layers.0.self_attn.in_proj" in topology.layers
        before = {name: layer.pattern.blocks() for name, layer in topology.layers.items()}
        draw = torch.Generator().manual_seed(1)
        for _ in range(8):
            x = torch.randn(4, 5, 16, generator=draw)
            function(x).square().mean().backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()
            averaged.update_parameters(model)
        moved = [n for n, layer in topology.layers.items() if not torch.equal(before[n], layer.pattern.blocks())]
        assert {n.rpartition(".")[2] for n in moved} >= {"in_proj", "out_proj", "linear1"}
        x = torch.randn(4, 5, 16, generator=draw)
        results.append((model(x), averaged(x)))
    torch.compiler.reset()
    torch.testing.assert_close(results[0], results[1])


def test_export_and_inference():
    model, x = encoder().eval(), torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = model(x)
        free = {0: torch.export.Dim("n", min=1, max=64)}
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch.export refuses what conftest.py says of it alone
        program = torch.export.export(model, (x,), dynamic_shapes=(free,)).module()
        torch.backends.cudnn.conv.fp32_precision = before
        torch.testing.assert_close(program(x[:2]), expected[:2])
        optimized = ua.optimize_for_inference(model, x)
        torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-5)
        kernels = {row.layer: row.kernel for row in optimized.explain(x) if row.density is not None}
        assert all("sparse" in kernel for kernel in kernels.values()) and len(kernels) == 9


def test_a_vision_transformer_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    torch.manual_seed(0)
    model = models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    ua.sparsify(model, 0.75, distribution="uniform")
    assert "encoder.layers.encoder_layer_1.self_attention.in_proj" in sparse_layers(model)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = ua.densify(copy.deepcopy(model))(x)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(ua.optimize_for_inference(model, x)(x), expected, rtol=1e-4, atol=1e-5)
        extractor = extraction.create_feature_extractor(model, ["encoder"])
        assert extractor(x)["encoder"].shape == (3, 17, 24)
