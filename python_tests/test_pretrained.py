"""From a trained network to a sparse one: what stays, what changes in place, and what is refused."""

import copy
import itertools
import logging
import math
import warnings

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.topology import layer_densities
from uasparse_kernels.topology.structure import row_counts


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(12, 24, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(24, 48, 1))
        self.head = nn.Linear(48, 12)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def mlp(*sizes):
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(sizes)))


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}


def dense_weights(model):
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def block_norms(weight, block):
    """Norms of blocks, ``[rows, columns, positions]``, and the way back: a mask of blocks to one of weights."""
    (bh, bw), (out, inp) = block, weight.shape[:2]
    view = weight.double().reshape(out // bh, bh, inp // bw, bw, -1)
    return view.square().sum((1, 3)).sqrt()


def expand(blocks, shape, block):
    return blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1).reshape(shape)


def best(values, k):
    """Of a flat tensor, the k largest as a mask."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.argsort(descending=True, stable=True)[:k]] = True
    return mask


@pytest.mark.parametrize("by", ["magnitude", "scores"])
@pytest.mark.parametrize("block", [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_the_largest_of_each_layer_stay(distribution, block, by):
    model = Network()
    weights = dense_weights(model)
    if by == "scores":
        ranks = {n: torch.randn_like(w) for n, w in weights.items()}
        # As a loop would make them: gradients of all parameters, biases too, which are not looked at.
        scores = {f"{n}.weight": s for n, s in ranks.items()} | {"head.bias": None}
        ua.sparsify(model, 0.7, distribution=distribution, block=block, scores=scores)
    else:
        ranks = weights
        ua.sparsify(model, 0.7, distribution=distribution, block=block, keep="magnitude")
    layers = sparse_layers(model)
    assert len(layers) >= 2
    for name, layer in layers.items():
        norms = block_norms(ranks[name], block)
        kept = best(norms.flatten(), layer.pattern.num_blocks).view_as(norms)
        assert torch.equal(layer.pattern.to_mask(), expand(kept, weights[name].shape, block))
        assert torch.equal(layer.dense_weight(), weights[name] * layer.pattern.to_mask())
    skip = ("stem",) if distribution == "uniform" else ()
    fits = {n: tuple(w.shape) for n, w in weights.items() if n not in skip}
    densities = layer_densities(fits, 0.3, distribution, dict.fromkeys(fits, block))
    assert {n: m.pattern.density for n, m in layers.items()} == pytest.approx(
        {n: d for n, d in densities.items() if d < 1}
    )


@pytest.mark.parametrize("block", [(1, 1), (3, 1), (3, 3)])
def test_one_threshold_over_all_layers(block):
    model = Network()
    model.stem.weight.data *= 1e-3  # none of it is among the largest: it keeps its best block
    weights = dense_weights(model)
    ua.sparsify(model, 0.8, keep="magnitude", distribution="global", block=block)
    norms = {n: block_norms(w, block) for n, w in weights.items()}
    for values in norms.values():
        values.view(-1)[values.argmax()] = math.inf
    everything = torch.cat([v.flatten() for v in norms.values()])
    budget = round(0.2 * sum(w.numel() for w in weights.values())) // math.prod(block)
    assert sum(m.pattern.num_blocks for m in sparse_layers(model).values()) == budget
    threshold = everything.sort(descending=True).values[budget - 1]
    assert model.stem.pattern.num_blocks == 1
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.pattern.to_mask(), expand(norms[name] >= threshold, weights[name].shape, block))


def test_a_layer_above_the_threshold_stays_dense():
    model = mlp(8, 8, 40)
    model[0].weight.data += 10
    kept = copy.deepcopy(model)
    ua.sparsify(model, 0.6, keep="magnitude", distribution="global")
    assert type(model[0]) is nn.Linear and isinstance(model[1], ua.SparseLinear)
    assert model[1].pattern.nnz == round(0.4 * 384) - 64
    ua.sparsify(kept, 0.6, keep="magnitude", distribution="global", include_dense=True)
    assert kept[0].pattern.density == 1


def test_blocks_of_several_sizes_are_compared_by_root_mean_square():
    def build():
        model = mlp(8, 8, 8)
        model[0].weight.data.uniform_(1.0, 1.1)
        model[1].weight.data.uniform_(1.2, 1.3)  # every weight is larger, but a block of the other has a larger norm
        return ua.sparsify(
            model,
            0.0,
            overrides={"0": {"pattern": ua.SparsityPattern.from_mask(torch.ones(8, 8), block=(4, 4))}},
            include_dense=True,
        )

    model = ua.sparsify(build(), 0.45, distribution="global", keep="magnitude")
    assert model[0].pattern.num_blocks == 1 and model[1].pattern.nnz == round(0.55 * 128) - 16


@pytest.mark.parametrize("density", [0.5, 0.3])
def test_rows_and_groups_keep_their_best(density):
    model = Network()
    weights = dense_weights(model)
    ua.sparsify(model, 1 - density, keep="magnitude", structure="fan-in")
    for name, layer in sparse_layers(model).items():
        rows = weights[name].flatten(1).abs()
        count = int(row_counts(layer.pattern)[0])
        assert torch.equal(layer.pattern.to_mask().flatten(1), torch.stack([best(row, count) for row in rows]))
    model = mlp(16, 12, 8)
    model.append(nn.Conv2d(8, 4, 3))
    weights = dense_weights(model)
    ua.sparsify(model, 0.75, keep="magnitude", structure="1:4", exempt=["2"], overrides={"2": 0.75})
    for name, layer in sparse_layers(model).items():
        out, inp, *_ = weights[name].shape
        groups = weights[name].abs().view(out, inp // 4, 4, -1)
        expected = groups == groups.amax(2, keepdim=True)
        assert torch.equal(layer.pattern.to_mask(), expected.view_as(weights[name]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "largest"}, "keep="),
        ({"distribution": "global"}, "keep="),
        ({"keep": "magnitude", "distribution": "global", "structure": "fan-in"}, "structure"),
        ({"keep": "magnitude", "overrides": {"0": 1.5}}, "sparsity in"),
        ({"keep": "magnitude", "overrides": {"0": {"block": (5, 5)}}}, "divides"),
        ({"structure": "2:4", "block": (2, 2)}, "block"),
        ({"scores": {"0": torch.ones(12, 16)}}, "'0'.*name of the weight"),
        ({"scores": {"0.weight": torch.ones(12, 16)}}, "1.weight.*none"),
        ({"scores": {"0.weight": torch.ones(12, 16), "1.weight": torch.ones(12, 8)}}, r"\(8, 12\).*got \(12, 8\)"),
        ({"scores": {"0.weight": torch.ones(12, 16), "1.weight": torch.full((8, 12), torch.nan)}}, "finite"),
        ({"scores": {"0.weight": torch.ones(12, 16), "1.weight": torch.ones(8, 12).long()}}, "floating point.*int64"),
        ({"scores": {}, "keep": "magnitude"}, "both"),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_what_cannot_be_chosen_is_refused_before_anything_changes(options, message, sparse):
    model = mlp(16, 12, 8)
    if sparse:
        ua.sparsify(model, 0.3, distribution="uniform")
        if "divides" in message:
            message = "block"
        if "(8, 12)" in message or "int64" in message or "got (12, 8)" in message:
            message = "scores of"
    before, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        ua.sparsify(model, 0.5, **options)
    assert list(model.modules()) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_weights_without_values_cannot_be_compared():
    with torch.device("meta"):
        model = mlp(8, 8)
    with pytest.raises(ValueError, match="meta"):
        ua.sparsify(model, 0.5, keep="magnitude")
    model = mlp(8, 8)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite weights"):
        ua.sparsify(model, 0.5, keep="magnitude")


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("sparsity", [0.9, 0.75, 0.5, 0.0])
def test_a_sparse_model_comes_to_another_sparsity_in_place(sparsity, block, storage):
    model = ua.sparsify(Network(), 0.75, block=block, storage=storage, exempt=["stem"])
    for layer in sparse_layers(model).values():
        layer.weight.grad = layer.weight.detach().clone()
    before = {n: (m, m.weight, m.dense_weight(), m.pattern.to_mask()) for n, m in sparse_layers(model).items()}
    shapes = {n: tuple(w.shape) for n, (_, _, w, _) in before.items()}
    assert ua.sparsify(model, sparsity, block=block, storage=storage, exempt=["stem"]) is model
    densities = layer_densities(shapes, 1 - sparsity, "erk", dict.fromkeys(shapes, block))
    for name, (module, parameter, weight, mask) in before.items():
        layer = model.get_submodule(name)
        assert layer is module and layer.weight is parameter and layer.storage == storage
        assert layer.pattern.density == pytest.approx(densities[name]) and layer.pattern.block == block
        now = layer.pattern.to_mask()
        if layer.pattern.density <= before[name][3].float().mean():
            norms = block_norms(weight, block)
            kept = best(norms.flatten(), layer.pattern.num_blocks).view_as(norms)
            assert torch.equal(now, expand(kept, shapes[name], block))
        else:
            assert bool((now | ~mask).all())
        assert torch.equal(layer.dense_weight(), weight * (now & mask))
        assert torch.equal(layer.weight.grad, layer.weight.detach())
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 12)


def test_what_grows_is_drawn_anew_or_of_largest_score():
    masks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = mlp(20, 20)
        ua.sparsify(model, 0.8, keep="magnitude", scores=None)
        masks.append(ua.sparsify(model, 0.5)[0].pattern.to_mask())
    assert not torch.equal(*masks)
    before, scores = model[0].pattern.to_mask(), torch.randn(20, 20)
    ua.sparsify(model, 0.2, scores={"0.weight": scores})
    expected = before | best(scores.abs().masked_fill(before, -1).flatten(), 120).view(20, 20)
    assert torch.equal(model[0].pattern.to_mask(), expected)
    packed = torch.rand_like(model[0].weight)  # scores of the parameter's own shape
    layer = copy.deepcopy(model[0])
    expected = layer.pattern.indices().view(-1)[best(packed.flatten(), 40)] if layer.storage == "packed" else None
    ua.sparsify(model, 0.9, scores={"0.weight": packed})
    if expected is not None:
        assert torch.equal(model[0].pattern.indices(), expected)


def test_a_sparse_model_takes_a_structure():
    model = ua.sparsify(mlp(16, 12, 8), 0.5, distribution="uniform")
    for name, structure in (("fan-in", "fan-in"), ("1:4", "1:4")):
        masks = {n: m.pattern.to_mask() for n, m in sparse_layers(model).items()}
        ua.sparsify(model, 0.75, structure=structure, distribution="uniform")
        for n, layer in sparse_layers(model).items():
            now = layer.pattern.to_mask()
            size = now.shape[1] if name == "fan-in" else 4
            kept, was = now.view(-1, size), masks[n].view(-1, size)
            assert bool((kept.sum(1) == size // 4).all())
            # No inactive weight comes where an active one could have stayed.
            assert bool((((kept & ~was).sum(1) == 0) | ((was & ~kept).sum(1) == 0)).all())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ua.DynamicSparsity(model, optimizer, method="1:4", total_steps=10, delta_t=1)


def test_dense_and_sparse_layers_share_a_budget():
    model = mlp(20, 30, 40)
    ua.sparsify(model, 0.5, exempt=["1"])
    weight = model[1].weight.detach().clone()
    ua.sparsify(model, 0.9, keep="magnitude", distribution="global")
    assert sum(m.pattern.nnz for m in sparse_layers(model).values()) == round(0.1 * 1800)
    assert torch.equal(model[1].dense_weight(), weight * model[1].pattern.to_mask())
    pattern = ua.SparsityPattern.random((30, 20), 0.4)
    first = model[0].weight
    ua.sparsify(model, 0.5, overrides={"0": {"pattern": pattern}}, filter=lambda *_: False)
    assert model[0].pattern.equal(pattern) and model[0].weight is first and model[0].pattern is not pattern
    with pytest.raises(ValueError, match="block"):
        ua.sparsify(model, 0.5, overrides={"0": {"block": (2, 2)}})


def test_one_threshold_does_not_grow():
    model = ua.sparsify(mlp(20, 30, 40), 0.5)
    with pytest.raises(ValueError, match="only takes weights away"):
        ua.sparsify(model, 0.1, keep="magnitude", distribution="global")


def test_what_holds_the_weights_is_named(caplog):
    model = ua.sparsify(mlp(20, 30, 40), 0.5, storage="packed")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    topology = ua.DynamicSparsity(model, optimizer, method="set", total_steps=10, delta_t=1)
    with pytest.raises(ValueError, match="detach"):
        ua.sparsify(model, 0.9)
    topology.detach()
    ua.sparsify(model, 0.9)
    assert "new optimizer" not in caplog.text  # it has no state yet
    model(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    ua.sparsify(model, 0.95)
    assert "SGD has state of the old ones" in caplog.text


def test_other_places_of_the_same_number_are_said(caplog):
    """Sizes stay, so that the next step of the optimiser would not fail."""
    model = ua.sparsify(mlp(20, 30, 40), 0.5, storage="packed")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    options = {"storage": "packed", "filter": lambda *_: False}
    ua.sparsify(model, 0.5, overrides={"0": {"pattern": model[0].pattern}}, **options)
    assert "new optimizer" not in caplog.text
    other = ua.SparsityPattern.random((30, 20), model[0].pattern.density)
    ua.sparsify(model, 0.5, overrides={"0": {"pattern": other}}, **options)
    assert "1 weights have another size or stand at other places" in caplog.text


def test_repack_follows_the_density_with_its_optimizer():
    torch.manual_seed(1)
    model = ua.sparsify(mlp(20, 30, 10), 0.0, include_dense=True)
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 20), torch.randint(10, (16,))

    def train(model, repacked):
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        gmp = ua.topology.GMP(final_sparsity=0.9)
        topology = ua.DynamicSparsity(model, optimizer, method=gmp, total_steps=8, delta_t=1, stop_fraction=1)
        for step in range(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if step == 9 and repacked:
                weights = [layer.weight for layer in model]
                assert all(layer.storage == "dense" for layer in model)
                assert ua.repack(model, optimizer=optimizer) is model
                assert all(layer.storage == "packed" for layer in model)
                assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
                assert all(layer.weight.grad.shape == layer.weight.shape for layer in model)
            optimizer.step()
            topology.step()
        return model, optimizer

    (packed, optimizer), (dense, _) = train(model, True), train(twin, False)
    for one, other in zip(packed, dense, strict=True):
        torch.testing.assert_close(one.dense_weight(), other.dense_weight())
        assert optimizer.state[one.weight]["exp_avg"].shape == one.pattern.packed_shape
    torch.testing.assert_close(packed(x), dense(x))
    ua.repack(packed, storage="dense", optimizer=optimizer)
    torch.testing.assert_close(packed(x), dense(x))
    with pytest.raises(ValueError, match="storage"):
        ua.repack(packed, storage="csr")


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv", "sparse", "sparse conv", "dense-stored", "fan-in"])
def test_the_unknown_output_leaves_the_others(kind):
    head = nn.Conv2d(12, 7, 1) if "conv" in kind else nn.Linear(12, 7, bias=kind != "no bias")
    head.weight.requires_grad_(kind != "sparse")
    model = nn.Sequential(nn.ReLU(), head)
    if "sparse" in kind or kind in ("dense-stored", "fan-in"):
        storage = "dense" if kind == "dense-stored" else "packed"
        ua.sparsify(
            model, 0.6, storage=storage, structure="fan-in" if kind == "fan-in" else None, distribution="uniform"
        )
    x = torch.randn(50, 12, *((3, 3) if "conv" in kind else ()))
    layer, before = model[1], model(x).detach()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert ua.add_unknown_output(model, "1") is model and model[1] is layer
    after = model(x)
    assert seen and after.shape[1] == 8 and layer.weight.requires_grad is (kind != "sparse")
    torch.testing.assert_close(after[:, :7], before)
    if isinstance(layer, ua.nn.SparseLayer):
        counts = row_counts(layer.pattern)
        assert int(counts[-1]) == round(float(counts[:-1].float().mean()))
        assert layer.storage == ("dense" if kind == "dense-stored" else "packed")
        weight = layer.dense_weight()
        mean = weight[:7].mean(0)
        mask = layer.pattern.to_mask()[-1]
        torch.testing.assert_close(weight[-1], mean * mask)
        assert mean[mask].abs().min() >= mean[~mask].abs().max()
    else:
        torch.testing.assert_close(after[:, 7], before.mean(1))
        assert torch.equal(after.argmax(1), before.argmax(1))
    loss_fn = ua.UnknownAwareLoss(7)
    if "conv" not in kind:
        loss_fn(after, torch.randint(7, (50,))).backward()
    assert ua.densify(copy.deepcopy(model))[1].weight.shape[0] == 8
    assert (layer.out_channels if "conv" in kind else layer.out_features) == 8


def test_an_unknown_output_that_cannot_be_is_refused():
    shared = mlp(8, 8, 8)
    shared[1].weight = shared[0].weight
    blocks = ua.sparsify(mlp(8, 8), 0.5, block=(2, 2))
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))
    parametrised = mlp(8, 8)
    nn.utils.parametrizations.weight_norm(parametrised[0])
    for model, name, message in [
        (mlp(8, 8), "head", "such as '0'"),
        (shared, "1", "shared by 2"),
        (blocks, "0", "blocks"),
        (grouped, "0", "one group"),
        (parametrised, "0", "parametrisation"),
    ]:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            ua.add_unknown_output(model, name)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model = ua.sparsify(mlp(8, 8), 0.5)
    topology = ua.DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=1000)
    with pytest.raises(ValueError, match="detach"):
        ua.add_unknown_output(model, "0")
    topology.detach()
    ua.add_unknown_output(model, "0")


def test_a_dense_checkpoint_in_a_random_pattern_is_warned_of():
    dense = mlp(8, 8, 8)
    model = ua.sparsify(mlp(8, 8, 8), 0.5)
    with pytest.warns(UserWarning, match='keep="magnitude"'):
        model.load_state_dict(dense.state_dict())
    with warnings.catch_warnings(record=True) as seen:  # once, as Python does by default, not once a layer
        warnings.simplefilter("default")
        model.load_state_dict(dense.state_dict())
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(ua.densify(copy.deepcopy(model)).state_dict())  # nothing is lost
        model.load_state_dict(ua.sparsify(dense, 0.75).state_dict())


def test_a_model_in_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp(8, 8)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for given in (wrapped, model):
            name = "module.0" if given is wrapped else "0"
            for call in (
                lambda m: ua.sparsify(m, 0.5),
                lambda m: ua.add_sparse_deltas(m, 0.5),
                lambda m, name=name: ua.add_unknown_output(m, name),
                ua.repack,
            ):
                with pytest.raises(ValueError, match="wrap it afterwards"):
                    call(given)
        assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
        ua.sparsify(mlp(8, 8), 0.5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.WARNING, logger="uasparse_kernels")
