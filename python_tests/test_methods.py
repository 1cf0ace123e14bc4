"""What each method promises of its patterns, and that all layers at once is the same as one by one."""

import dataclasses
import math

import pages
import pytest
import torch
from methods_support import batch, network, sparse_layers, train
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import topology
from uasparse_kernels.ops.prune_grow import resize
from uasparse_kernels.topology import growth
from uasparse_kernels.topology.dynamic import resolve_method

NAMES = ["rigl", "set", "mest", "gmp", "granet", "srigl", "2:4"]


def check_state(model, optimizer, storage):
    """Patterns are consistent, and all that belongs to a weight has its shape and lies on active weights only."""
    for layer in sparse_layers(model).values():
        pattern = layer.pattern
        rebuilt = ua.SparsityPattern.from_blocks(pattern.shape, pattern.blocks(), block=pattern.block)
        for mine, fresh in zip(pattern.tensors(), rebuilt.tensors(), strict=True):
            assert torch.equal(mine, fresh)
        states = [s for s in optimizer.state[layer.weight].values() if s.dim()]
        expected = pattern.packed_shape if storage == "packed" else pattern.shape
        for tensor in (layer.weight, *states):
            assert tuple(tensor.shape) == tuple(expected)
            if storage == "dense":
                assert not (tensor.detach() * ~pattern.to_mask()).any()


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_moves_and_keeps_its_house_in_order(name, storage):
    model = network(name, storage)
    layers = sparse_layers(model)
    before = {n: (m.weight, m.pattern.blocks()) for n, m in layers.items()}
    make = lambda p: torch.optim.Adam(p, 0.01)  # noqa: E731
    _, optimizer = train(model, name, make=make, on_update=lambda dst: check_state(model, dst.optimizer, storage))
    check_state(model, optimizer, storage)
    for n, layer in layers.items():
        assert layer.weight is before[n][0]
        assert not torch.equal(layer.pattern.blocks(), before[n][1])


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_patterns(name):
    runs = []
    for _ in range(2):
        model = network(name)
        train(model, name)
        runs.append([m.pattern.blocks() for m in sparse_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("name", "regrow_dropped"),
    [("rigl", True), ("set", True), ("mest", True), ("2:4", True), ("rigl", False), ("set", False), ("mest", False)],
)
def test_constant_density(name, regrow_dropped):
    model = network(name)
    counts = {n: m.pattern.nnz for n, m in sparse_layers(model).items()}
    train(model, dataclasses.replace(resolve_method(name), regrow_dropped=regrow_dropped))
    assert counts == {n: m.pattern.nnz for n, m in sparse_layers(model).items()}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("base", [topology.GMP, topology.GraNet])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_gradual_pruning_follows_the_cubic_schedule(base, scope, block):
    """s = s_f + (s_i - s_f) (1 - t / n)^3 after update t of n: of each layer, or of all."""
    model = network("gmp" if base is topology.GMP else "granet", block=block)
    layers = sparse_layers(model)
    grids = {n: math.prod(m.pattern.grid) for n, m in layers.items()}
    initial = {n: m.pattern.num_blocks for n, m in layers.items()}
    assert base is not topology.GMP or initial == grids
    updates = []

    def left(blocks, size, t):
        start = 1 - blocks / size
        return round(size * (1 - (0.9 + (start - 0.9) * (1 - t) ** 3)))

    def check(dst):
        updates.append(dst.steps)
        t = dst.steps / 14  # updates at 2, 4, ... 14 of 20 * 0.75 steps
        now = {n: m.pattern.num_blocks for n, m in layers.items()}
        if scope == "layer":
            assert now == {n: max(1, left(initial[n], grids[n], t)) for n in layers}
        else:
            assert sum(now.values()) == left(sum(initial.values()), sum(grids.values()), t)
            assert min(now.values()) >= 1

    train(model, base(scope=scope, final_sparsity=0.9), on_update=check)
    assert updates == [2, 4, 6, 8, 10, 12, 14]


def expected_global(layers, k):
    """Blocks dropped by the k lowest magnitudes of all layers, by sorting, each layer's best spared."""
    entries = []
    for i, layer in enumerate(layers):
        values = layer.weight.detach().abs()
        best = int(values.argmax())
        entries += [(v, i, j) for j, v in enumerate(values.tolist()) if j != best]
    out = sorted(entries)[:k]
    return [layer.pattern.blocks()[sorted(j for _, i, j in out if i == at)] for at, layer in enumerate(layers)]


def test_global_dropping_is_by_one_threshold():
    model = network()
    layers = list(sparse_layers(model).values())
    with torch.no_grad():
        layers[0].weight.mul_(100)  # of one layer nothing is low
    dst = ua.DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=10)
    updates = [
        topology.LayerUpdate(m.weight.detach(), None, m.pattern, m.pattern.num_blocks, lambda: iter(())) for m in layers
    ]
    update = topology.Update(updates, 0.4, 1.0, dst.generator)
    changes = topology.SET(scope="global").update(update)
    k = sum(math.ceil(0.4 * m.pattern.num_blocks) for m in layers)
    for (dropped, grown), expected in zip(changes, expected_global(layers, k), strict=True):
        assert torch.equal(dropped, expected)
        assert dropped.numel() == grown.numel()
    assert changes[0][0].numel() == 0
    assert sum(dropped.numel() for dropped, _ in changes) == k


@pytest.mark.parametrize("name", ["rigl", "set", "mest"])
@pytest.mark.parametrize("sparsity", [0.75, 0.1])
def test_dropped_weights_stay_out_where_they_are_no_candidates(name, sparsity):
    model = network(sparsity=sparsity)
    method = type(topology.METHODS[name]())(regrow_dropped=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    dst = ua.DynamicSparsity(model, optimizer, method=method, total_steps=9, delta_t=1, drop_fraction=0.5)
    for _ in range(3):
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        before = {n: (m.pattern.to_mask(), m.pattern.num_blocks) for n, m in sparse_layers(model).items()}
        fraction = dst.schedule.fraction(dst.steps + 1)
        dst.step()
        for n, layer in sparse_layers(model).items():
            old, count = before[n]
            free = math.prod(layer.pattern.grid) - count
            moved = int((layer.pattern.to_mask() & ~old).sum())
            assert moved == min(math.ceil(fraction * count), free)
            assert layer.pattern.num_blocks == count
        optimizer.zero_grad()


def test_mest_drops_by_weight_and_gradient():
    layer = ua.SparseLinear(30, 20, sparsity=0.7, dtype=torch.float64)
    method = topology.MEST(drop=topology.magnitude_and_gradient(3.0), reset_regrown=True)  # zeros tell what was grown
    dst = ua.DynamicSparsity(layer, torch.optim.SGD(layer.parameters(), 1e-30), method=method, total_steps=9, delta_t=1)
    with pytest.raises(RuntimeError, match="before zero_grad"):
        dst.step()
    dst.steps = 0
    layer(torch.randn(5, 30, dtype=torch.float64)).square().sum().backward()
    score = layer.weight.detach().abs() + 3 * layer.weight.grad.abs()
    blocks, k = layer.pattern.blocks(), math.ceil(dst.schedule.fraction(1) * layer.pattern.nnz)
    kept = blocks[score.argsort()[k:]].sort().values
    dst.step()
    assert set(kept.tolist()) <= set(layer.pattern.blocks().tolist())
    zeros = layer.pattern.blocks()[layer.weight == 0]
    assert zeros.numel() == k and not set(zeros.tolist()) & set(kept.tolist())


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize(
    "shape, block", [((9, 7), (1, 1)), ((8, 5, 3, 2), (1, 1)), ((8, 6), (4, 1)), ((6, 6, 2, 2), (2, 2))]
)
def test_relative_magnitude_is_the_share_of_a_row(shape, block, storage):
    pattern = ua.SparsityPattern.random(shape, 0.4, block=block, generator=torch.Generator().manual_seed(len(shape)))
    dense = pattern.unpack(torch.randn(pattern.packed_shape, dtype=torch.float64))
    blocks = pattern.blocks()
    dense[: block[0]] = 0  # a row whose weights were grown just now
    columns = pattern.grid[1]
    norms = topology.magnitude(topology.LayerUpdate(dense, None, pattern, 1, _no_gradient))
    expected = []
    for index, norm in zip(blocks.tolist(), norms.tolist(), strict=True):
        total = sum(n for i, n in zip(blocks.tolist(), norms.tolist(), strict=True) if i // columns == index // columns)
        expected.append(norm / total if total else 0.0)
    weight = pattern.pack(dense) if storage == "packed" else dense
    before = weight.clone()
    layer = topology.LayerUpdate(weight, None, pattern, pattern.num_blocks, _no_gradient)
    torch.testing.assert_close(topology.relative_magnitude(layer).tolist(), expected, rtol=1e-12, atol=0)
    assert torch.equal(weight, before)


def test_relative_magnitude_keeps_outputs_alive():
    """The weights of large rows push out those of small ones by magnitude; a share of the row does not."""
    alive = {}
    for drop in (topology.magnitude, topology.relative_magnitude):
        torch.manual_seed(0)
        model = nn.Sequential(
            ua.SparseLinear(40, 60, sparsity=0.97, bias=False),
            nn.BatchNorm1d(60),
            nn.ReLU(),
            ua.SparseLinear(60, 8, sparsity=0.5, storage="packed"),
        )
        with torch.no_grad():
            crow = model[0].pattern.crow
            model[0].weight[: int(crow[10])] *= 100
        before = int((crow.diff() > 0).sum())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        dst = ua.DynamicSparsity(model, optimizer, method=topology.RigL(drop=drop), total_steps=40, delta_t=2)
        while not dst.frozen:
            nn.functional.cross_entropy(model(torch.randn(32, 40)), torch.randint(8, (32,))).backward()
            optimizer.step()
            dst.step()
            optimizer.zero_grad()
        alive[drop] = int((model[0].pattern.crow.diff() > 0).sum())
    lost = {drop: before - n for drop, n in alive.items()}
    assert lost[topology.relative_magnitude] <= 1 and lost[topology.magnitude] >= 4, lost


def _no_gradient():
    raise AssertionError("dropping needs no dense gradient")


class OneByOne(topology.Method):
    """A method asked for one layer at a time."""

    def __init__(self, method):
        object.__setattr__(self, "method", method)

    needs_gradient = property(lambda self: self.method.needs_gradient)
    resizes = property(lambda self: self.method.resizes)

    def update(self, update):
        alone = [
            self.method.update(topology.Update([layer], update.fraction, update.progress, update.generator))
            for layer in update.layers
        ]
        return [changes[0] for changes in alone]


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("name", ["rigl", "set", "mest", "srigl", "gmp"])
@pytest.mark.parametrize("tile", [50, 1000])
def test_all_layers_at_once_is_the_same_as_one_by_one(name, storage, tile, monkeypatch):
    monkeypatch.setattr(growth, "_TILE_ENTRIES", tile)
    together, alone = network(name, storage), network(name, storage)
    method = topology.METHODS[name]()
    train(together, method)
    train(alone, OneByOne(method))
    for a, b in zip(together.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("name", ["gmp", "granet", "srigl"])
@pytest.mark.parametrize("stop", [4, 9])
def test_resumes_bit_for_bit_after_changes_of_size(name, storage, stop, tmp_path):
    batches = [batch(torch.float32) for _ in range(12)]
    method = topology.SRigL(min_salient=0.9) if name == "srigl" else name

    def setup():
        model = network(name, storage, dtype=torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        dst = ua.DynamicSparsity(model, optimizer, method=method, total_steps=12, delta_t=2, stop_fraction=1.0)
        return model, optimizer, dst

    def go(model, optimizer, dst, some):
        for x, y in some:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            dst.step()
            optimizer.zero_grad()

    whole, first, second = setup(), setup(), setup()
    go(*whole, batches)
    go(*first, batches[:stop])
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    for part, state in zip(second, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    go(*second, batches[stop:])
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key]), key


def device_update(name, device):
    """One update of three layers, gradients given, on a device: what is dropped, grown, and the patterns after."""
    g = torch.Generator().manual_seed(7)
    layers = []
    for shape in ((24, 40), (16, 8, 3, 3), (8, 12)):
        if name in ("srigl", "2:4"):
            structure = "fan-in" if name == "srigl" else name
            pattern = topology.structured_pattern(shape, 0.5, structure, generator=g)
        else:
            pattern = ua.SparsityPattern.random(shape, 0.5, generator=g)
        weight, active = (torch.randn(pattern.nnz, generator=g).to(device) for _ in range(2))
        gradient = torch.randn(shape, generator=g).mul_(8).round_().to(device)  # ties, and the same on every device
        tiles = lambda rows=gradient: ((r, rows[r : r + 4]) for r in range(0, rows.shape[0], 4))  # noqa: E731
        layers.append(topology.LayerUpdate(weight, active, pattern.to(device), pattern.num_blocks, tiles))
    changes = resolve_method(name).update(topology.Update(layers, 0.3, 0.5, torch.Generator().manual_seed(1)))
    for layer, (dropped, grown) in zip(layers, changes, strict=True):
        resize(layer.weight, layer.pattern, dropped, grown)
    found = [(dropped, grown, layer.pattern.blocks()) for layer, (dropped, grown) in zip(layers, changes, strict=True)]
    return [tensor.cpu() for parts in found for tensor in parts]


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_decides_as_the_cpu_does(name):
    for a, b in zip(device_update(name, "cpu"), device_update(name, "cuda"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["rigl", "gmp"])
def test_the_host_does_not_wait_for_a_gpu(name):
    model = network(name, dtype=torch.float32).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    dst = ua.DynamicSparsity(model, optimizer, method=name, total_steps=9, delta_t=1)
    x, y = (tensor.cuda() for tensor in batch(torch.float32))
    for _ in range(2):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert dst.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_an_update_of_given_gradients(name):
    """The test above, as far as a CPU can say: it changes every layer, and does so again in the same way."""
    first, second = device_update(name, "cpu"), device_update(name, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(dropped.numel() > 0 for dropped in first[::3])


@pytest.mark.parametrize("name", ["rigl", "granet"])
def test_a_compiled_model_follows(name):
    """Sizes that change make it compile anew; the result stays that of the model itself."""
    torch.compiler.reset()
    results = []
    for compile_it in (True, False):
        model = network(name, dtype=torch.float32)
        function = torch.compile(model, backend="aot_eager") if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        dst = ua.DynamicSparsity(model, optimizer, method=name, total_steps=9, delta_t=2)
        torch.manual_seed(0)
        for _ in range(5):
            x, y = batch(torch.float32)
            nn.functional.cross_entropy(function(x), y).backward()
            optimizer.step()
            dst.step()
            optimizer.zero_grad()
        results.append([layer.pattern.blocks() for layer in sparse_layers(model).values()])
    torch.compiler.reset()  # what was compiled counts against the limit of other tests
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topology.Method(scope="model"), "scope"),
        (lambda: topology.GMP(final_sparsity=1.0), "final_sparsity"),
        (lambda: topology.Method(grow=None), "grows nothing"),
        (lambda: topology.NOfM(n=4), "0 < n < m"),
        (lambda: topology.NOfM.of("4:2"), "N:M"),
        (lambda: topology.NOfM(regrow_dropped=False), "regrow_dropped"),
        (lambda: topology.SRigL(min_salient=2), "min_salient"),
        (lambda: topology.SRigL(scope="global"), "min_salient"),
        (lambda: train(network(), "srigl"), "fan-in"),
        (lambda: train(network(), "2:4"), "2:4"),
        (lambda: train(network("granet"), "granet", delta_t=50), "gradual pruning"),
        (lambda: ua.sparsify(nn.Linear(8, 8), 0.6, structure="2:4"), "the sparsity 0.5"),
        (lambda: ua.sparsify(nn.Linear(8, 8), 0.5, structure="2-4"), "N:M"),
        (lambda: topology.structured_pattern((8, 6), 0.5, "2:4"), "divides"),
    ],
)
def test_bad_use_is_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_documented_example_trains(tmp_path):
    """The code of docs/methods.md, as it stands there."""
    blocks = [block for _, blocks in pages.sections("docs/methods.md") for block in blocks]
    scope = {}
    pages.run(blocks, scope, tmp_path, None)
    model = scope["model"]
    before = [m.pattern.blocks() for m in sparse_layers(model).values()]
    for _ in range(8):
        nn.functional.cross_entropy(model(torch.randn(12, 64)), torch.randint(16, (12,))).backward()
        scope["optimizer"].step()
        scope["topology"].step()
        scope["optimizer"].zero_grad()
    after = [m.pattern.blocks() for m in sparse_layers(model).values()]
    assert len(before) == 3
    assert all(a.numel() == b.numel() and not torch.equal(a, b) for a, b in zip(before, after, strict=True))
