"""optimize_for_inference against the model itself, and the compiled kernels against torch in float64."""

import copy
import os
import threading

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as prunes
from torch.utils import _pytree as pytree
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import _mobilenet_v3_conf

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.inference.graph import Graph, Node, Ref
from uasparse_kernels.inference.plan import captured_shapes, shapes_by_run
from uasparse_kernels.inference.run import OptimizedModel

pytestmark = pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part")


def prune(model, sparsity=0.9, seed=0):
    """Zeros in most weights, and batch norms that are not the identity: networks that others pruned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(module, nn.Conv2d | nn.Linear):
                if not module.weight.any():
                    module.weight.normal_(0, 0.1, generator=generator)
                module.weight *= torch.rand(module.weight.shape, generator=generator) >= sparsity
                module.weight *= (1 - sparsity) ** -0.5
    return model.eval()


def error(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def check(model, *sizes, batches=(1, 2, 5), bound=1e-5):
    example = tuple(torch.randn(1, *size) for size in sizes)
    optimized = ua.optimize_for_inference(model, example)
    exact = copy.deepcopy(ua.densify(copy.deepcopy(model))).double()
    for batch in batches:
        inputs = [torch.randn(batch, *size) for size in sizes]
        with torch.no_grad():
            wanted = exact(*(x.double() for x in inputs))
        got = optimized(*inputs)
        assert got.shape == wanted.shape and got.dtype == torch.float32
        assert error(got, wanted) < bound
        graph = optimized._graph
        known, by_run = captured_shapes(graph, inputs), shapes_by_run(graph, inputs)
        names = by_run.keys() - graph.constants.keys()  # some constants are made from others, or used by nobody
        assert names and {name: known[name] for name in names} == {name: by_run[name] for name in names}
    return optimized


def alone(target, args, constants, x, after=()):
    """A model of one node (and some after it), without a capture."""
    nodes = [Node("y", target, args, {})]
    for i, (act, extra) in enumerate(after):
        nodes.append(Node(f"y{i}", act, [Ref(nodes[-1].name), *extra], {}))
    spec = pytree.tree_structure(((x,), {}))
    out = pytree.tree_structure(x)
    graph = Graph(
        ["x"], nodes, [Ref(nodes[-1].name)], constants, [list(x.shape)], [x.dtype],
        spec, out, {}, {},
    )  # fmt: skip
    return OptimizedModel(graph)


ACTIVATIONS = [
    ("aten.relu.default", ()),
    ("aten.hardtanh.default", (0.0, 6.0)),
    ("aten.silu.default", ()),
    ("aten.gelu.default", ()),
    ("aten.hardswish.default", ()),
    ("aten.leaky_relu.default", (0.1,)),
    ("aten.sigmoid.default", ()),
    ("aten.hardsigmoid.default", ()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(40))
def test_convolutions_of_random_shapes(seed, dtype):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    groups = (1, 1, 1, 2, 4)[draw(0, 4)]
    channels, out = groups * draw(1, 9), groups * draw(1, 13)
    if seed % 5 == 0:
        groups, out = channels, channels * draw(1, 2)
    kernel = (draw(1, 7), draw(1, 7)) if seed % 3 else (3, 3)
    stride, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2))
    padding = (draw(0, kernel[0]), draw(0, kernel[1]))
    least = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    size = (draw(1, 4), channels, least[0] + draw(0, 30), least[1] + draw(0, 30))
    density = (0.05, 0.1, 0.5, 1.0)[draw(0, 3)]
    weight = torch.randn(out, channels // groups, *kernel, generator=generator, dtype=dtype)
    weight *= torch.rand(weight.shape, generator=generator) < density
    bias = torch.randn(out, generator=generator, dtype=dtype)
    x = torch.randn(size, generator=generator, dtype=dtype)
    act, extra = ACTIVATIONS[seed % len(ACTIVATIONS)]
    args = [Ref("x"), Ref("w"), Ref("b"), list(stride), list(padding), list(dilation), groups]
    model = alone("aten.conv2d.default", args, {"w": weight, "b": bias}, x, [(act, extra)])
    got = model(x)
    y = nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation, groups)
    wanted = getattr(torch.ops.aten, act.split(".")[1]).default(y, *extra)
    assert error(got, wanted) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert all(call.program is not None for call in model._plan([x]).calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 37), (3, 700), (8, 64), (9, 65), (2, 33, 40), (70, 1030)])
def test_linear_layers_of_few_and_many_rows(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(53, shape[-1], generator=generator, dtype=dtype)
    weight *= torch.rand(weight.shape, generator=generator) < 0.15
    x = torch.randn(shape, generator=generator, dtype=dtype)
    bias = torch.randn(53, generator=generator, dtype=dtype)
    model = alone("aten.linear.default", [Ref("x"), Ref("w"), Ref("b")], {"w": weight, "b": bias}, x,
                  [("aten.gelu.default", ())])  # fmt: skip
    wanted = nn.functional.gelu(nn.functional.linear(x.double(), weight.double(), bias.double()))
    assert error(model(x), wanted) < (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2), (2, 1, 0)])
def test_pooling(kind, kernel, stride, padding):
    x = torch.randn(3, 5, 13, 11) - 2
    pool = nn.MaxPool2d(kernel, stride, padding) if kind == "max" else nn.AvgPool2d(kernel, stride, padding)
    optimized = check(prune(nn.Sequential(nn.Conv2d(5, 7, 1), pool), 0.5), x.shape[1:])
    assert not [step for step in optimized.explain(x) if step.kernel == "torch"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel, stride, padding, width", [
    (2, 2, 0, 70), (3, 2, 1, 5), (3, 2, 1, 112), (3, 1, 1, 17), (5, 3, 2, 41), (2, 1, 0, 2500), (600, 500, 290, 610),
])  # fmt: skip
def test_max_pooling_of_every_width_keeps_nan(kernel, stride, padding, width, dtype):
    x = torch.randn(2, 3, max(9, kernel) if kernel < 600 else 601, width, dtype=dtype)
    x[torch.rand_like(x) < 0.02] = float("nan")
    same = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.MaxPool2d(kernel, stride, padding)).eval()
    nn.init.ones_(same[0].weight)
    optimized = ua.optimize_for_inference(same.to(dtype), x)
    torch.testing.assert_close(optimized(x), same[1](x), rtol=0, atol=0, equal_nan=True)
    assert not [step for step in optimized.explain(x) if step.kernel == "torch"]


def test_all_activations_over_their_range():
    x = torch.linspace(-30, 30, 4001).view(1, 1, 1, -1)
    for act, extra in [*ACTIVATIONS, ("aten.gelu.default", ())]:
        model = alone("aten.conv2d.default", [Ref("x"), Ref("w"), None], {"w": torch.ones(1, 1, 1, 1)}, x,
                      [(act, extra)])  # fmt: skip
        wanted = getattr(torch.ops.aten, act.split(".")[1]).default(x.double(), *extra)
        torch.testing.assert_close(model(x).double(), wanted, rtol=2e-6, atol=1e-6)
    huge = torch.tensor([-float("inf"), -1e37, -1e20, -100.0, 100.0, 1e20, 1e37]).view(1, 1, 1, -1)
    nan = torch.tensor([-1, -2, -3, -4, 0x7F800001, 0x7FC00001, 0x7FFFFFFF], dtype=torch.int32).view_as(huge)
    nan = nan.view(torch.float32)
    for act, extra in [*ACTIVATIONS, ("aten.gelu.default", ())]:
        model = alone("aten.conv2d.default", [Ref("x"), Ref("w"), None], {"w": torch.ones(1, 1, 1, 1)}, huge,
                      [(act, extra)])  # fmt: skip
        wanted = getattr(torch.ops.aten, act.split(".")[1]).default(huge.double(), *extra).float()
        torch.testing.assert_close(model(huge), wanted, rtol=2e-6, atol=1e-6, equal_nan=True)
        assert model(nan).isnan().all()
    odd = torch.tensor([float("nan"), float("inf"), 1.0, 2.0]).view(1, 1, 2, 2)
    model = alone("aten.conv2d.default", [Ref("x"), Ref("w"), None], {"w": torch.ones(1, 1, 1, 1)}, odd,
                  [("aten.relu.default", ())])  # fmt: skip
    torch.testing.assert_close(model(odd), odd, equal_nan=True)


class Residual(nn.Module):
    """Additions on both sides, of a result that is read later too, and of a broadcast one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.norm(self.a(x)).relu()
        z = (self.b(y) + y).relu()
        w = x + self.c(z)
        return w + self.b(w) + self.a(w).mean((2, 3), keepdim=True) + torch.cat([y, z], 1)[:, 2:10]


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=11), (3, 33, 47)),
    # Their first blocks, which have all that the later ones have.
    "mobilenet_v2": (
        lambda: torchvision.models.MobileNetV2(11, 0.35, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]),
        (3, 40, 40),
    ),
    "mobilenet_v3": (
        lambda: torchvision.models.MobileNetV3(_mobilenet_v3_conf("mobilenet_v3_small")[0][:5], 64, num_classes=11),
        (3, 40, 40),
    ),
    "vgg": (
        lambda: torchvision.models.VGG(torchvision.models.vgg.make_layers([16, "M", 24, "M"], True), 5),
        (3, 28, 28),
    ),
    "densenet": (lambda: torchvision.models.DenseNet(12, (2, 3), 16, num_classes=7), (3, 45, 45)),
    "convnext": (
        lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(24, 40, 2), CNBlockConfig(40, None, 2)], num_classes=7
        ),
        (3, 41, 41),
    ),
    "vit": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=7), (3, 32, 32)),
    "residual": (Residual, (8, 9, 13)),
    "mlp": (lambda: nn.Sequential(nn.Linear(70, 90), nn.ReLU(), nn.Linear(90, 90), nn.GELU(), nn.Linear(90, 5)), (70,)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    if name == "vgg":  # its classifier has 25088 inputs a channel count of 512
        build, size = NETWORKS[name]
        model = build()
        model.classifier = nn.Sequential(nn.Linear(24 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))
    else:
        build, size = NETWORKS[name]
        model = build()
    torch.manual_seed(0)
    check(prune(model), size, batches=(1, 3, 9))


def test_models_of_other_libraries():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=7, pretrained=False)
    check(prune(model), (3, 64, 64), batches=(1, 3))


def test_a_hugging_face_encoder():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=50
    )
    model = prune(transformers.BertModel(config))
    tokens = torch.randint(50, (2, 17))
    optimized = ua.optimize_for_inference(model, (tokens, torch.ones_like(tokens)))
    for batch in (1, 2, 5):
        tokens, mask = torch.randint(50, (batch, 17)), torch.ones(batch, 17, dtype=torch.int64)
        mask[0, 11:] = 0
        with torch.no_grad():
            wanted = model(tokens, mask)
        got = optimized(tokens, mask)
        assert error(got["last_hidden_state"], wanted["last_hidden_state"]) < 1e-5
        assert error(got["pooler_output"], wanted["pooler_output"]) < 1e-5


LARGE = ("resnet50", "mobilenet_v2", "vgg11_bn", "densenet121", "convnext_tiny", "vit_b_16")


@pytest.mark.skipif("UASPARSE_TEST_LARGE" not in os.environ, reason="a minute: set UASPARSE_TEST_LARGE=1")
@pytest.mark.parametrize("name", LARGE)
def test_whole_networks(name):
    check(prune(getattr(torchvision.models, name)()), (3, 224, 224), batches=(1, 2))


def test_sparse_layers_and_their_files(tmp_path):
    torch.manual_seed(0)
    model = ua.sparsify(torchvision.models.resnet18(num_classes=11), 0.9, distribution="uniform").eval()
    before = copy.deepcopy(model.state_dict())
    optimized = check(model, (3, 64, 64), batches=(1, 2))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    optimized.save(tmp_path / "net.safetensors")
    again = ua.load_optimized(tmp_path / "net.safetensors")
    x = torch.randn(3, 3, 64, 64)
    assert torch.equal(again(x), optimized(x))
    dense = sum(t.nbytes for t in ua.densify(copy.deepcopy(model)).state_dict().values())
    ua.save_sparse(model, tmp_path / "weights.safetensors")
    assert all(file.stat().st_size < 0.16 * dense for file in tmp_path.iterdir())
    layers = ua.explain(optimized, x)
    assert abs(sum(layer.share for layer in layers) - 1) < 1e-6
    found = {layer.layer: layer for layer in layers if layer.density is not None}
    assert found["layer1.0.conv2"].fused == ("batch norm", "residual", "relu")
    assert found["layer1.0.conv2"].density == pytest.approx(0.1, abs=0.01)


def test_results_do_not_depend_on_threads_or_callers():
    torch.manual_seed(0)
    optimized = ua.optimize_for_inference(prune(torchvision.models.resnet18(num_classes=11)), torch.randn(1, 3, 64, 64))
    inputs = [torch.randn(n, 3, 64, 64) for n in (1, 4, 2)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = [optimized(x) for x in inputs]
        torch.set_num_threads(3)
        assert all(torch.equal(optimized(x), y) for x, y in zip(inputs, wanted, strict=True))
    finally:
        torch.set_num_threads(before)
    wrong = []

    def call(i):
        torch.set_num_threads(1 + i)  # this thread's
        for _ in range(10):
            if not torch.equal(optimized(inputs[i]), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert not wrong


def test_refusals():
    model = prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval"):
        ua.optimize_for_inference(copy.deepcopy(model).train(), x)

    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ValueError, match=r"torch\.export could not capture"):
        ua.optimize_for_inference(Branching().eval(), x)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=r"all of float32.*model\.float"):
            ua.optimize_for_inference(copy.deepcopy(model).to(dtype), x.to(dtype))
    with pytest.raises(TypeError, match=r"torch\.float32, torch\.float64"):
        ua.optimize_for_inference(model, x.double())
    optimized = ua.optimize_for_inference(model, x)
    with pytest.raises(ValueError, match=r"of shape \[batch, 3, 8, 8\], got \[2, 3, 9, 8\]"):
        optimized(torch.randn(2, 3, 9, 8))
    with pytest.raises(TypeError, match=r"dtype torch\.float32, got torch\.float64"):
        optimized(x.double())
    with pytest.raises(ValueError, match="Expected 1 inputs"):
        optimized(x, x)
    with pytest.raises(ValueError, match="no training mode"):
        optimized.train()
    fixed = ua.optimize_for_inference(model, x, dynamic_batch=False)
    with pytest.raises(ValueError, match=r"of shape \[2, 3, 8, 8\]"):
        fixed(x[:1])
    model[1].train()
    with pytest.raises(ValueError, match=r"got '1' in training mode"):
        ua.optimize_for_inference(model, x)
    model.eval()
    for odd in (x[0], x[:0], x[..., None], torch.randn(2, 4, 8, 8), "images", None):
        with pytest.raises(ValueError, match=r"Expected (x|input)"):
            optimized(odd)
    for odd in ((), "images", {"x": x}):
        with pytest.raises(ValueError, match="at least one tensor" if not isinstance(odd, dict) else "export"):
            ua.optimize_for_inference(model, odd)
    with pytest.raises(ValueError, match="a batch of at least 1"):
        ua.optimize_for_inference(model, x[:0])
    with pytest.raises(ValueError, match=r"a batch of at least 1, got \[0, 3, 8, 8\]"):
        ua.optimize_for_inference(model, x[:0], dynamic_batch=False)
    with pytest.raises(ValueError, match=r"with a batch, got a number; pass dynamic_batch=False"):
        ua.optimize_for_inference(nn.Identity().eval(), torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"a model \(nn\.Module\), got a function"):
        ua.optimize_for_inference(lambda x: x, x)
    with pytest.raises(ValueError, match=r"Expected everything on the CPU, got 0\.weight on meta"):
        ua.optimize_for_inference(copy.deepcopy(model).to("meta"), x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Pairing(nn.Module):
    def forward(self, x):
        return x[:2] + x[2:]


class Unseen(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() + 1)


@pytest.mark.parametrize(
    "model, message",
    [
        (Counting(), "changes no buffer"),
        (Pairing(), r"torch\.export could not capture.*dynamic_batch=False"),
        (Unseen(), r"torch\.export could not capture"),
    ],
    ids=["a buffer that changes", "a batch that cannot vary", "numpy"],
)
def test_graphs_that_cannot_be_taken(model, message):
    with pytest.raises(ValueError, match=message):
        ua.optimize_for_inference(model.eval(), torch.randn(4, 3))


def test_torch_compile_leaves_an_optimised_model_as_it_is():
    optimized = ua.optimize_for_inference(prune(nn.Sequential(nn.Linear(70, 9))), torch.randn(1, 70))
    x = torch.randn(3, 70)
    torch.testing.assert_close(torch.compile(lambda x: optimized(x).relu(), backend="eager")(x), optimized(x).relu())


class Mask(nn.Module):
    """A parametrisation as libraries of sparse training have it."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mask", torch.rand(shape) < 0.1)

    def forward(self, weight):
        return weight * self.mask


PRUNED = {
    "masks on": lambda layer: prunes.l1_unstructured(layer, "weight", 0.9),
    "twice": lambda layer: prunes.l1_unstructured(prunes.random_structured(layer, "weight", 0.5, 0), "weight", 0.8),
    "permanent": lambda layer: prunes.remove(prunes.l1_unstructured(layer, "weight", 0.9), "weight"),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Mask(layer.weight.shape)),
    "rows of blocks": lambda layer: layer.weight.data.view(-1, 4, *layer.weight.shape[1:])[::3].zero_(),
    "blocks": lambda layer: layer.weight.data.mul_(
        (torch.rand(layer.weight.shape[0] // 4, *layer.weight.shape[1:]) < 0.1).repeat_interleave(4, 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", PRUNED)
def test_networks_that_others_pruned(how):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8),
    )  # fmt: skip
    layers = [model[i] for i in (0, 3, 7, 9)]
    for layer in layers:
        PRUNED[how](layer)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):  # before and after a call, which leaves computed weights in the layers
        optimized = ua.optimize_for_inference(model, torch.randn(1, 4, 9, 11))
        for batch in (1, 3, 20):
            x = torch.randn(batch, 4, 9, 11)
            with torch.no_grad():
                torch.testing.assert_close(optimized(x), model(x), rtol=1e-5, atol=1e-6)
        found = {step.layer: step for step in optimized.explain(x[:2]) if step.density is not None}
        for name, layer in zip(("0", "3", "7", "9"), layers, strict=True):
            assert found[name].density == pytest.approx((layer.weight != 0).double().mean().item())
            assert found[name].kernel != "torch" or found[name].density > 0.35
        model(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hasattr(layers[0], "weight_mask") == (how in ("masks on", "twice"))


def test_a_dense_layer_stays_dense():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[2].weight[torch.rand(64, 64) < 0.9] = 0
    steps = {
        step.layer: step for step in ua.optimize_for_inference(model, torch.randn(1, 64)).explain(torch.randn(1, 64))
    }
    assert steps["0"].kernel == "torch" and "density 1.00 above" in steps["0"].reason
    assert steps["2"].kernel.startswith("sparse")


class Odd(nn.Module):
    """A network of one line."""

    def __init__(self, run):
        super().__init__()
        self.c, self.d = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.linear, self.shift = (
            nn.BatchNorm2d(16),
            nn.Linear(16, 16),
            nn.Parameter(torch.randn(1, 16, 1, 1)),
        )
        self.norm.running_mean.normal_()
        self.run = run

    def forward(self, x):
        return self.run(self, self.c(x))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, y: (y, y.relu()),
        lambda m, y: (y, m.norm(y)),
        lambda m, y: (y + m.shift).relu(),
        lambda m, y: torch.add(m.d(y), y, alpha=2),
        lambda m, y: m.d(y) - y,
        lambda m, y: y + y,
        lambda m, y: m.d(y).add_(y).relu_(),
        lambda m, y: m.d(m.d(y)),
        lambda m, y: y + m.d(y).mean((2, 3), keepdim=True),
        lambda m, y: (lambda t: m.linear(t) + t.mean(1, keepdim=True))(y.flatten(2).transpose(1, 2)),
        lambda m, y: m.linear(y.mean((2, 3))).softmax(0),
        lambda m, y: torch.roll(y, 1, 0) - y.mean(0, keepdim=True),
    ],
    ids=[
        "two outputs", "before and after a norm", "broadcast constant", "weighted sum", "difference", "doubled",
        "in place", "layer used twice", "broadcast map", "broadcast rows", "softmax over the batch", "mixed samples",
    ],
)  # fmt: skip
def test_what_looks_like_a_fusion_or_a_chain_and_is_none(run):
    torch.manual_seed(0)
    model = prune(Odd(run).eval())
    optimized = ua.optimize_for_inference(model, torch.randn(2, 8, 9, 7))
    for batch in (1, 3, 40):
        x = torch.randn(batch, 8, 9, 7)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(optimized(x), expected, rtol=1e-4, atol=1e-5)
