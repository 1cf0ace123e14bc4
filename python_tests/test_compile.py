"""torch.compile, torch.export and AOTInductor: one graph for all sizes, topology updates, what is noticed inside."""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

import uasparse_kernels as ua


@pytest.fixture(autouse=True)
def _fresh(one_thread):
    torch.compiler.reset()
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # torch.export refuses what conftest.py says of it alone
    yield
    torch.backends.cudnn.conv.fp32_precision = before
    torch.compiler.reset()
    # What a method that changes sizes has set (pattern.py).
    torch._dynamo.config.force_parameter_static_shapes = True
    torch._dynamo.config.force_nn_module_property_static_shapes = True


def compile_and_count(model, backend="aot_eager"):
    """The model, compiled as one graph, and a list that grows with every compilation."""
    graphs, inner = [], lookup_backend(backend)

    def count(graph, inputs):
        graphs.append(graph)
        return inner(graph, inputs)

    return torch.compile(model, backend=count, fullgraph=True), graphs


def make_layer(kind, storage):
    """A layer, and inputs of many sizes; its density lies between the crossovers of few and of many inputs."""
    if kind == "conv":
        layer = ua.SparseConv2d(4, 8, 3, sparsity=0.8, storage=storage)
        sizes = [(5, 8, 8), (7, 8, 8), (2, 9, 12), (33, 6, 5)]
        return layer, [torch.randn(n, 4, *image, requires_grad=True) for n, *image in sizes]
    layer = ua.SparseLinear(24, 16, sparsity=0.3, storage=storage)
    return layer, [torch.randn(*n, 24, requires_grad=True) for n in ((64,), (3,), (16,), (17,), (2,), (300,))]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_graph_serves_all_sizes(kind, storage, frozen):
    """Dynamo makes the first size a constant, then symbols; the height of an image may become one later."""
    layer, inputs = make_layer(kind, storage)
    layer.weight.requires_grad_(not frozen)
    compiled, graphs = compile_and_count(layer)
    for x in inputs:
        got = [compiled(x), *torch.autograd.grad(compiled(x).sin().sum(), x)]
        want = [layer(x), *torch.autograd.grad(layer(x).sin().sum(), x)]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) <= (2 if kind == "linear" else 3)


def test_export_with_free_sizes():
    model = nn.Sequential(ua.SparseConv2d(3, 8, 3, sparsity=0.7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = model.append(ua.SparseLinear(8, 5, sparsity=0.5)).eval()
    free = {0: torch.export.Dim("n", min=1, max=512)}
    program = torch.export.export(model, (torch.randn(4, 3, 9, 9),), dynamic_shapes=(free,)).module()
    for n in (1, 2, 17, 300):
        x = torch.randn(n, 3, 9, 9)
        torch.testing.assert_close(program(x), model(x))


def test_trace_runs_at_other_sizes():
    model = nn.Sequential(ua.SparseLinear(64, 32, sparsity=0.8), nn.ReLU(), ua.SparseLinear(32, 8, sparsity=0.6)).eval()
    with torch.no_grad():
        for traced_at in (1, 2, 64):
            traced = torch.jit.trace(model, torch.randn(traced_at, 64))
            for n in (1, 8, 9, 300):
                x = torch.randn(n, 64)
                torch.testing.assert_close(traced(x), model(x))


def test_a_package_of_aot_inductor(tmp_path):
    model = nn.Sequential(ua.SparseLinear(16, 12, sparsity=0.6), nn.ReLU()).eval()
    free = {0: torch.export.Dim("n", min=1, max=512)}
    program = torch.export.export(model, (torch.randn(4, 16),), dynamic_shapes=(free,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for n in (1, 4, 100):
        x = torch.randn(n, 16)
        torch.testing.assert_close(package(x), model(x))


def network(storage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))
    return ua.sparsify(model, 0.7, distribution="uniform", storage=storage)


def train(method, storage, backend=None, *, attach="before", steps=16):
    """Patterns and weights after a training, and the number of graphs that it took."""
    model, graphs = network(storage), []
    function = model
    if backend is not None:
        function, graphs = compile_and_count(model, backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    draw = torch.Generator().manual_seed(1)
    if attach == "after":
        function(torch.randn(16, 20)).sum().backward()
        optimizer.zero_grad()
    options = {"total_steps": steps, "delta_t": 2, "generator": torch.Generator().manual_seed(2)}
    topology = ua.DynamicSparsity(model, optimizer, method=method, **options)
    for _ in range(steps):
        x, y = torch.randn(16, 20, generator=draw), torch.randint(5, (16,), generator=draw)
        nn.functional.cross_entropy(function(x), y).backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
    layers = topology.layers.values()
    return [t for layer in layers for t in (layer.pattern.blocks(), layer.weight.detach())], len(graphs)


@pytest.mark.parametrize(
    ("method", "storage", "attach", "most"),
    [
        ("rigl", "packed", "before", 2),  # one graph, and one that hands gradients over
        ("rigl", "dense", "before", 2),
        ("rigl", "packed", "after", 3),  # and one of the model before
        ("set", "packed", "before", 2),
        ("gmp", "packed", "before", 4),  # sizes that change become symbols; dense at first
        ("gmp", "dense", "before", 4),
        ("granet", "packed", "before", 6),
    ],
)
def test_topology_updates_in_one_graph(method, storage, attach, most):
    results, graphs = train(method, storage, "aot_eager", attach=attach)
    expected, _ = train(method, storage)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert graphs <= most


def test_what_a_compiled_graph_hands_over_is_a_copy():
    """Inductor uses memory again, that of an activation too."""
    results, graphs = train("rigl", "packed", "inductor", steps=6)
    expected, _ = train("rigl", "packed", steps=6)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert graphs == 2


def test_weights_of_another_pattern_are_noticed_in_a_graph():
    layer, x = ua.SparseLinear(24, 16, sparsity=0.7, storage="packed"), torch.randn(4, 24)
    compiled, _ = compile_and_count(layer)
    compiled(x)
    layer.pattern.signature.data[0] *= 2
    with pytest.raises(RuntimeError, match="came with another"):
        compiled(x)
