import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import uasparse_kernels as ua
from uasparse_kernels.topology import CosineSchedule, growth

BLOCKS = [(1, 1), (3, 1), (3, 3)]


def network(storage="packed", block=(1, 1), dtype=torch.float64, sparsity=0.7):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 9, 15),
        nn.ReLU(),
        nn.Linear(15, 9),
    ).to(dtype)
    return ua.sparsify(model, sparsity, storage=storage, block=block, distribution="uniform")


def batch(size=8, dtype=torch.float64):
    return torch.randn(size, 3, 6, 6, dtype=dtype), torch.randint(9, (size,))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, ua.nn.SparseLayer)}


def dense_gradients(model, batches):
    """Gradients of the dense weights, by autograd on the dense twin."""
    dense = ua.densify(copy.deepcopy(model))
    for x, y in batches:
        (loss_of(dense, x, y) / len(batches)).backward()
    return {n: dense.get_submodule(n).weight.grad for n in sparse_layers(model)}


def to_grid(tensor, pattern):
    """Norms of the blocks, as a flat grid, straight from the definition."""
    (bh, bw), shape = pattern.block, pattern.shape
    view = tensor.reshape(shape[0] // bh, bh, shape[1] // bw, bw, -1)
    return view.pow(2).sum((1, 3)).sqrt().reshape(-1)


def expected_blocks(layer, weight, gradient, fraction):
    """The active blocks after RigL's update, by sorting everything."""
    pattern = layer.pattern
    active = pattern.blocks()
    k = math.ceil(fraction * pattern.num_blocks)
    kept = active[to_grid(weight, pattern)[active].sort(stable=True).indices[k:]]
    scores = to_grid(gradient, pattern)
    scores[kept] = -1
    grown = scores.sort(descending=True, stable=True).indices[:k]
    return torch.cat([kept, grown]).sort().values


def unpacked(layer, tensor):
    return layer.pattern.unpack(tensor) if layer.storage == "packed" else tensor.clone()


def run(model, method, steps, optimizer=None, delta_t=2, **kwargs):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    kwargs = {"total_steps": steps} | kwargs
    topology = ua.DynamicSparsity(model, optimizer, method=method, delta_t=delta_t, **kwargs)
    for _ in range(steps):
        loss_of(model, *batch()).backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
    return topology


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tile", [1, 50, 1 << 20])
def test_rigl_update_is_the_papers(storage, block, tile, monkeypatch):
    monkeypatch.setattr(growth, "_TILE_ENTRIES", tile)
    model = network(storage, block)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=8, delta_t=2)
    for step in (1, 2, 3, 4):
        x, y = batch()
        gradients = dense_gradients(model, [(x, y)])
        loss_of(model, x, y).backward()
        optimizer.step()
        layers = sparse_layers(model)
        weights = {n: m.dense_weight() for n, m in layers.items()}
        fraction = topology.schedule.fraction(step)
        expected = {n: expected_blocks(m, weights[n], gradients[n], fraction) for n, m in layers.items()}
        before = {n: m.pattern.blocks() for n, m in layers.items()}
        momenta = {n: unpacked(m, optimizer.state[m.weight]["momentum_buffer"]) for n, m in layers.items()}
        assert topology.step() == (step % 2 == 0)
        optimizer.zero_grad()
        for name, layer in layers.items():
            if step % 2:
                assert torch.equal(layer.pattern.blocks(), before[name])
                continue
            assert torch.equal(layer.pattern.blocks(), expected[name])
            # What was active and still is keeps its value and momentum, dropped in between or not; others start at 0.
            now = unpacked(layer, optimizer.state[layer.weight]["momentum_buffer"])
            for tensor, was in ((layer.dense_weight(), weights[name]), (now, momenta[name])):
                assert torch.equal(tensor, was * layer.pattern.to_mask())


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("block", BLOCKS)
def test_counts_stay_exact_and_parameters_keep_their_identity(method, storage, block):
    model = network(storage, block)
    layers = sparse_layers(model)
    before = {n: (m.pattern.nnz, m.weight, m.weight.data_ptr(), m.pattern.blocks()) for n, m in layers.items()}
    topology = run(model, method, 20)
    assert topology.frozen
    for name, layer in layers.items():
        nnz, weight, pointer, blocks = before[name]
        assert layer.pattern.nnz == nnz == layer.pattern.to_mask().sum()
        assert layer.weight is weight
        assert layer.weight.data_ptr() == pointer
        assert not torch.equal(layer.pattern.blocks(), blocks)
        rebuilt = ua.SparsityPattern.from_blocks(layer.pattern.shape, layer.pattern.blocks(), block=block)
        for mine, fresh in zip(layer.pattern.tensors(), rebuilt.tensors(), strict=True):
            assert torch.equal(mine, fresh)
        if storage == "dense":
            assert not (layer.weight.detach() * ~layer.pattern.to_mask()).any()


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.01),
    ],
)
def test_optimizer_state_moves_with_the_weights(storage, make):
    model = network(storage)
    optimizer = make(model.parameters())
    topology = ua.DynamicSparsity(model, optimizer, total_steps=8, delta_t=2)

    def dense_states(layer):
        states = {k: v for k, v in optimizer.state[layer.weight].items() if v.shape == layer.weight.shape}
        states["grad"] = layer.weight.grad
        return {k: layer.pattern.unpack(v) if storage == "packed" else v.clone() for k, v in states.items()}

    for step in (1, 2):
        loss_of(model, *batch()).backward()
        optimizer.step()
        layers = sparse_layers(model)
        before = {n: (dense_states(m), m.pattern.to_mask(), m.dense_weight()) for n, m in layers.items()}
        topology.step()
        if step == 2:
            for name, layer in layers.items():
                states, mask, weight = before[name]
                kept = mask & layer.pattern.to_mask() & (layer.dense_weight() == weight)
                assert 0 < kept.sum() < layer.pattern.nnz
                for key, value in dense_states(layer).items():
                    assert torch.equal(value, states[key] * kept), key
                    assert len(states) > 1
        optimizer.zero_grad()


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_gradient_accumulation_and_reuse_add_up(storage):
    """Two micro-batches grow what their joint batch grows; so does a layer that is applied twice."""
    results = []
    x, y = batch()
    for micro in (1, 2):
        model = network(storage)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        topology = ua.DynamicSparsity(model, optimizer, total_steps=4, delta_t=1)
        for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (loss_of(model, part_x, part_y) / micro).backward()
        optimizer.step()
        assert topology.step()
        results.append([layer.pattern.blocks() for layer in sparse_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    layer = ua.SparseLinear(12, 12, sparsity=0.7, storage=storage, dtype=torch.float64)
    dense = layer.to_dense()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-30)
    topology = ua.DynamicSparsity(layer, optimizer, total_steps=4, delta_t=1)
    x = torch.randn(5, 12, dtype=torch.float64)
    layer(layer(x).relu_()).square().sum().backward()
    dense(dense(x).relu_()).square().sum().backward()
    expected = expected_blocks(layer, layer.dense_weight(), dense.weight.grad, topology.schedule.fraction(1))
    topology.step()
    assert torch.equal(layer.pattern.blocks(), expected)


@pytest.mark.parametrize("padding", [0, "same", (2, 1)])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("tile", [1, 200])
def test_tiles_are_the_dense_gradient_of_a_convolution(padding, padding_mode, tile, monkeypatch):
    monkeypatch.setattr(growth, "_TILE_ENTRIES", tile)
    layer = ua.SparseConv2d(
        4, 6, (2, 3), 1, padding, 1, 2, padding_mode=padding_mode, sparsity=0.5, dtype=torch.float64
    )
    dense = layer.to_dense()
    capture = growth.GradientCapture()
    capture.arm(layer)
    layer.register_forward_hook(capture, with_kwargs=True)
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    for module in (layer, dense):
        module(input=x).sin().sum().backward()
        module(x[0]).cos().sum().backward()
    tiles = list(capture.tiles(layer))
    assert [first for first, _ in tiles] == list(torch.tensor([0, *[t.shape[0] for _, t in tiles][:-1]]).cumsum(0))
    torch.testing.assert_close(torch.cat([t for _, t in tiles]), dense.weight.grad)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any op made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_the_dense_gradient_never_exists_as_a_whole(method, monkeypatch):
    monkeypatch.setattr(growth, "_TILE_ENTRIES", 4000)
    model = ua.sparsify(nn.Sequential(nn.Linear(300, 300)), 0.98)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    topology = ua.DynamicSparsity(model, optimizer, method=method, total_steps=9, delta_t=1)
    with LargestTensor() as largest:
        model(torch.randn(16, 300)).square().sum().backward()
        optimizer.step()
        assert topology.step()
    assert largest.numel < 3 * 4000 < 300 * 300


def test_update_instead_of_the_optimizer_step():
    """Called before optimizer.step(), an update moves the gradient too, so that both orders are usable."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=8, delta_t=1)
    loss_of(model, *batch()).backward()
    layer = model[5]
    gradient, mask = layer.pattern.unpack(layer.weight.grad), layer.pattern.to_mask()
    weight = layer.dense_weight()
    assert topology.step()
    survived = mask & layer.pattern.to_mask() & (layer.dense_weight() == weight)
    assert torch.equal(layer.pattern.unpack(layer.weight.grad), gradient * survived)


def test_static_and_frozen_change_nothing():
    model = network()
    before = {n: m.pattern.blocks() for n, m in sparse_layers(model).items()}
    topology = run(model, "static", 10)
    assert topology.frozen
    assert all(torch.equal(m.pattern.blocks(), before[n]) for n, m in sparse_layers(model).items())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=8, delta_t=2, stop_fraction=0.5)
    updates = []
    for _ in range(8):
        loss_of(model, *batch()).backward()
        updates.append((topology.step(), topology.frozen))
    assert updates == [(False, False), (True, True)] + [(False, True)] * 6


def test_schedule_counts_optimizer_steps():
    schedule = CosineSchedule(total_steps=1000, delta_t=100)
    assert schedule.end == 750
    assert [t for t in range(1001) if schedule.is_update(t)] == [100, 200, 300, 400, 500, 600, 700]
    assert schedule.fraction(0) == 0.3
    assert schedule.fraction(375) == pytest.approx(0.15)
    assert schedule.fraction(750) == 0
    assert [schedule.is_over(t) for t in (699, 700, 701)] == [False, True, True]


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resumes_bit_for_bit(method, storage, stop, tmp_path):
    batches = [batch(dtype=torch.float32) for _ in range(12)]

    def setup():
        model = network(storage, dtype=torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        return model, optimizer, ua.DynamicSparsity(model, optimizer, method=method, total_steps=12, delta_t=2)

    def train(model, optimizer, topology, batches):
        for x, y in batches:
            loss_of(model, x, y).backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()

    whole = setup()
    train(*whole, batches)
    first = setup()
    train(*first, batches[:stop])
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    second = setup()
    torch.manual_seed(99)
    for part, state in zip(second, torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    train(*second, batches[stop:])
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key]), key


def test_copies_of_the_model_carry_no_optimizer():
    model = network()
    topology = run(model, "rigl", 1, delta_t=2, total_steps=8)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    hook = next(iter(copied[5]._forward_hooks.values()))
    assert isinstance(hook, growth.GradientCapture)
    assert not hook.armed
    assert not hook.pairs
    assert hook is not next(iter(model[5]._forward_hooks.values()))
    assert topology._captures["5"].armed
    loss_of(copied, *batch()).backward()
    assert not hook.pairs
    copied.load_state_dict(model.state_dict())


def test_layers_that_took_no_part_stay_as_they_are():
    model = nn.ModuleDict({"used": nn.Linear(30, 30), "idle": nn.Linear(30, 30)})
    ua.sparsify(model, 0.9, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=9, delta_t=1)
    before = {n: m.pattern.blocks() for n, m in model.items()}
    model["used"](torch.randn(4, 30)).square().sum().backward()
    assert topology.step()
    assert torch.equal(model["idle"].pattern.blocks(), before["idle"])
    assert not torch.equal(model["used"].pattern.blocks(), before["used"])


def test_works_with_a_compiled_model():
    model = network(dtype=torch.float32)
    twin = network(dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    patterns = []
    for net, function in ((model, torch.compile(model, backend="aot_eager")), (twin, twin)):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        topology = ua.DynamicSparsity(net, optimizer, total_steps=9, delta_t=2)
        for _ in range(4):
            nn.functional.cross_entropy(function(x), y).backward()
            optimizer.step()
            topology.step()
            optimizer.zero_grad()
        patterns.append([layer.pattern.blocks() for layer in sparse_layers(net).values()])
    assert all(torch.equal(a, b) for a, b in zip(*patterns, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "rigel"}, "'rigel'"),
        ({"total_steps": 0}, "total_steps"),
        ({"delta_t": 0}, "delta_t"),
        ({"drop_fraction": 1.5}, "drop_fraction"),
        ({"stop_fraction": -1}, "stop_fraction"),
    ],
)
def test_bad_arguments(kwargs, message):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=message):
        ua.DynamicSparsity(model, optimizer, **{"total_steps": 10, **kwargs})


def test_a_model_without_sparse_layers_and_a_step_without_backward():
    dense = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="sparsify"):
        ua.DynamicSparsity(dense, torch.optim.SGD(dense.parameters(), 0.1), total_steps=10)
    model = network()
    before = copy.deepcopy(model.state_dict())
    topology = ua.DynamicSparsity(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=10, delta_t=1)
    with pytest.raises(RuntimeError, match="backward pass"):
        topology.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
