"""Methods whose patterns have a structure: N:M and a constant fan-in (SRigL)."""

import copy
import math

import pytest
import torch
from methods_support import batch, network, sparse_layers, train
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import topology
from uasparse_kernels.ops.prune_grow import apply, resize
from uasparse_kernels.topology import growth


@pytest.mark.parametrize("shape", [(6, 8), (6, 12, 3, 2)])
@pytest.mark.parametrize("structure", ["2:4", "1:2", "3:4"])
@pytest.mark.parametrize("tile", [1, 50, 1 << 20])
def test_n_of_m_in_every_group(shape, structure, tile, monkeypatch):
    monkeypatch.setattr(growth, "_TILE_ENTRIES", tile)
    n, m = map(int, structure.split(":"))
    g = torch.Generator().manual_seed(4)
    pattern = topology.structured_pattern(shape, n / m, structure, generator=g)
    gradient = torch.randn(shape, generator=g, dtype=torch.float64).mul_(4).round_()  # ties
    gradient.view(-1)[::7] = math.nan
    weight = torch.randn(pattern.nnz, generator=g, dtype=torch.float64)
    tiles = lambda: ((r, gradient[r : r + 2]) for r in range(0, shape[0], 2))  # noqa: E731
    layer = topology.LayerUpdate(weight, None, pattern, pattern.num_blocks, tiles)
    before = pattern.to_mask()
    ((dropped, grown),) = topology.NOfM.of(structure).update(topology.Update([layer], 0.4, 1.0, g))
    assert dropped.numel() == grown.numel() == math.ceil(0.4 * pattern.nnz)
    apply(weight, pattern, dropped, grown)
    view = pattern.to_mask().view(shape[0], shape[1] // m, m, -1)
    assert (view.sum(2) == n).all()
    # In each group the best of what is free, ties to the lower channel.
    kept = before & ~pattern.mask_of(dropped)
    scores = gradient.abs().nan_to_num(nan=-1.0).masked_fill(kept, -2.0).view_as(view)
    order = scores.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    wanted = n - kept.view_as(view).sum(2, keepdim=True)
    assert torch.equal(view, (order < wanted) | kept.view_as(view))


def test_n_of_m_patterns_stay_n_of_m_in_training():
    model = network("2:4")

    def check(_):
        for layer in sparse_layers(model).values():
            out, inp = layer.pattern.shape[:2]
            assert (layer.pattern.to_mask().view(out, inp // 4, 4, -1).sum(2) == 2).all()

    train(model, "2:4", on_update=check)


def test_a_loaded_pattern_that_is_not_the_methods_is_refused():
    model = network("2:4")
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = ua.DynamicSparsity(model, optimizer, method="2:4", total_steps=20, delta_t=1)
    name, layer = next(iter(sparse_layers(other).items()))
    layer.pattern.set_blocks_(torch.arange(layer.pattern.num_blocks))
    model.load_state_dict(other.state_dict())
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=f"{name}: Expected 2 active weights in every 4"):
        topology.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("block", [(1, 1), (2, 1)])
@pytest.mark.parametrize("min_salient", [0.3, 0.9])
def test_srigl_keeps_a_constant_fan_in(block, min_salient):
    model = network("srigl", block=block)
    layers = sparse_layers(model)
    initial = {n: m.pattern.num_blocks for n, m in layers.items()}
    history = {n: [] for n in layers}

    def check(_):
        for n, layer in layers.items():
            counts = topology.structure.row_counts(layer.pattern)
            alive = counts > 0
            fan_in = initial[n] // int(alive.sum())
            assert (counts[alive] == min(fan_in, layer.pattern.grid[1])).all()
            history[n].append(alive)

    train(model, topology.SRigL(min_salient=min_salient), drop_fraction=0.5, on_update=check)
    ablated = sum(int((~masks[-1]).sum()) for masks in history.values())
    assert list(history.values())[-1][-1].all()  # but never the network's outputs
    assert ablated > 0 or min_salient < 0.9


@pytest.mark.parametrize("min_salient", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_srigl_is_the_papers(min_salient, last, seed):
    """Against the steps of section 3 and of the authors' code, one by one on dense tensors, for several updates."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = 12, 20
    pattern = topology.structured_pattern((rows, columns), 0.25, "fan-in", generator=g)
    initial, scale = pattern.num_blocks, torch.rand(rows, 1, generator=g, dtype=torch.float64)
    w = torch.randn(rows, columns, generator=g, dtype=torch.float64) * scale * pattern.to_mask()
    came_back, ablated = 0, torch.zeros(rows, dtype=torch.bool)
    for step in range(5):
        gradient = torch.randn(rows, columns, generator=g, dtype=torch.float64) * scale
        if step == 2:  # what was ablated is wanted again
            gradient = gradient / scale**3
        weight, mask, n = pattern.pack(w), pattern.to_mask(), pattern.num_blocks
        k = math.ceil(0.3 * n)
        survive = torch.zeros(rows * columns, dtype=torch.bool)
        survive[w.abs().masked_fill(~mask, -1).view(-1).argsort(descending=True)[: n - k]] = True
        salient = survive.clone()
        salient[gradient.abs().view(-1).argsort(descending=True)[:k]] = True
        salient = salient.view(rows, columns).sum(1)
        ranked = salient.sort(descending=True).values
        needed = min(max(1, int(min_salient * (initial // rows))), int(ranked[initial // columns]))
        alive = salient >= needed
        if last or min_salient == 0:
            alive[:] = True
        fan_in = initial // int(alive.sum())
        score = w.abs().masked_fill(~(mask & alive[:, None]), -1)
        new = torch.zeros(rows * columns, dtype=torch.bool)
        new[score.view(-1).argsort(descending=True)[: n - k]] = True
        new = new.view(rows, columns) & (score >= 0)
        for r in range(rows):
            new[r, score[r].argsort(descending=True)[fan_in:]] = False
            grow = gradient[r].abs().masked_fill(new[r], -1).argsort(descending=True)
            new[r, grow[: (fan_in - int(new[r].sum())) * bool(alive[r])]] = True

        layer = topology.LayerUpdate(weight, None, pattern, initial, lambda x=gradient: iter([(0, x)]), last=last)
        ((dropped, grown),) = topology.SRigL(min_salient=min_salient).update(topology.Update([layer], 0.3, 1.0, g))
        resize(weight, pattern, dropped, grown)
        assert torch.equal(pattern.to_mask(), new)
        w = pattern.unpack(weight) + 0.3 * torch.randn(rows, columns, generator=g, dtype=torch.float64) * scale * new
        came_back, ablated = came_back + int((alive & ablated).sum()), ~alive
    assert came_back or min_salient < 0.9 or last


@pytest.mark.parametrize(
    ("density", "min_salient", "rows"),
    [(0.1, 0.3, (60, 64)), (0.1, 0.7, (44, 60)), (0.1, 0.95, (28, 46)), (0.5, 0.95, (33, 44))],
)
def test_srigl_does_not_collapse(density, min_salient, rows):
    """The authors' code leaves 64, 53, 36 and 35 of 64 rows in this training, of as many weights as at first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    ua.sparsify(model, 1 - density, distribution="uniform", structure="fan-in")
    x = torch.randn(512, 64)
    y = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))(x).argmax(1)
    before = model[0].pattern.nnz
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    dst = ua.DynamicSparsity(
        model, optimizer, method=topology.SRigL(min_salient=min_salient), total_steps=400, delta_t=10
    )
    while not dst.frozen:
        some = torch.randint(512, (64,))
        nn.functional.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
        dst.step()
        optimizer.zero_grad()
    alive = int((topology.structure.row_counts(model[0].pattern) > 0).sum())
    assert rows[0] <= alive <= rows[1]
    assert before - alive < model[0].pattern.nnz <= before
    assert (topology.structure.row_counts(model[2].pattern) > 0).all()


def test_structured_patterns():
    model = network("srigl", sparsity=0.8)
    for layer in sparse_layers(model).values():
        counts = topology.structure.row_counts(layer.pattern)
        assert (counts == max(1, round(0.2 * layer.pattern.grid[1]))).all()
    odd = ua.sparsify(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8)), 0.5, structure="2:4")
    assert isinstance(odd[0], ua.SparseLinear) and type(odd[1]) is nn.Linear
    dense = ua.sparsify(nn.Sequential(nn.Linear(3, 4), nn.Linear(400, 400)), 0.9)
    assert type(dense[0]) is nn.Linear
    dense = ua.sparsify(nn.Sequential(nn.Linear(3, 4), nn.Linear(400, 400)), 0.9, include_dense=True)
    assert dense[0].pattern.density == 1
