"""Plans for serve_run, of small random networks, and what they must give (fuzz_ops.py)."""

import torch
from fuzz_references import within
from torch.utils import _pytree as pytree

from uasparse_kernels.inference.graph import Graph, Node, Ref, fill, resolve
from uasparse_kernels.inference.run import OptimizedModel

ACTIVATIONS = {
    "aten.relu.default": [], "aten.hardtanh.default": [0.0, 6.0], "aten.silu.default": [], "aten.gelu.default": [],
    "aten.hardswish.default": [], "aten.leaky_relu.default": [0.1], "aten.sigmoid.default": [],
    "aten.hardsigmoid.default": [],
}  # fmt: skip

# Of the plan that was made last: its tensors, and what it gives.
last: tuple[list[torch.Tensor], list] | None = None


class Network:
    """Nodes one after the other; `shape` is that of the last one's result."""

    def __init__(self, rng, shape, dtype):
        self.rng, self.shape, self.dtype, self.terms = rng, list(shape), dtype, 1
        self.nodes, self.constants = [], {}

    @property
    def last(self):
        return Ref(self.nodes[-1].name if self.nodes else "x")

    def add(self, target, *args):
        name = f"n{len(self.nodes)}"
        self.nodes.append(Node(name, target, list(args), {}))
        return name

    def constant(self, *sizes, density=1.0):
        values = torch.randn(sizes, dtype=self.dtype) * (torch.rand(sizes) < density)
        if len(sizes) > 1 and self.rng.random() < 0.2:  # fours of output channels that share their columns
            values = values[: -(-sizes[0] // 4)].repeat_interleave(4, 0)[: sizes[0]].contiguous()
        name = f"c{len(self.constants)}"
        self.constants[name] = values
        return Ref(name)

    def conv(self):
        rng, (_, channels, height, width) = self.rng, self.shape
        groups = rng.choice([1, 1, 1, channels])
        out = groups * rng.randint(1, 12)
        kernel, stride, dilation = (
            [rng.choice(values) for _ in range(2)] for values in ([1, 3, 2, 5], [1, 1, 2, 3], [1, 1, 2])
        )
        padding = [rng.randint(0, k) for k in kernel]
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)]  # fmt: skip
        if min(size) < 1:
            return
        weight = self.constant(out, channels // groups, *kernel, density=rng.choice([0.0, 0.05, 0.3, 1.0]))
        bias = self.constant(out) if rng.random() < 0.7 else None
        self.terms += channels // groups * kernel[0] * kernel[1]
        self.add("aten.conv2d.default", self.last, weight, bias, stride, padding, dilation, groups)
        self.shape = [self.shape[0], out, *size]

    def linear(self):
        out, inp = self.rng.randint(1, 40), self.shape[-1]
        weight = self.constant(out, inp, density=self.rng.choice([0.0, 0.05, 0.2, 0.3]))
        bias = self.constant(out) if self.rng.random() < 0.7 else None
        self.terms += inp
        before, residual = self.last, out == inp and self.rng.random() < 0.5
        self.add("aten.linear.default", before, weight, bias)
        if residual:
            self.add("aten.add.Tensor", self.last, before)
        self.shape = [*self.shape[:-1], out]

    def act(self):
        target = self.rng.choice(list(ACTIVATIONS))
        self.add(target, self.last, *ACTIVATIONS[target])

    def pool(self):
        kernel, stride = [self.rng.randint(1, 3) for _ in range(2)], [self.rng.randint(1, 3) for _ in range(2)]
        padding = [self.rng.randint(0, k // 2) for k in kernel]
        size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(self.shape[2:], padding, kernel, stride, strict=True)]
        if min(size) < 1:
            return
        if self.rng.random() < 0.5:
            self.add("aten.max_pool2d.default", self.last, kernel, stride, padding)
        else:
            self.add("aten.avg_pool2d.default", self.last, kernel, stride, padding, False, self.rng.random() < 0.5)
        self.shape = [*self.shape[:2], *size]

    def twice(self):
        """Something and itself, added or side by side."""
        before = self.last
        self.act()
        if self.rng.random() < 0.5:
            self.add("aten.add.Tensor", self.last, before)
        else:
            self.add("aten.cat.default", [self.last, before], 1)
            self.shape[1] *= 2

    def evaluate(self, x, sizes=False):
        """In float64; with ``sizes`` a bound of what is summed: nothing cancels, no activation shrinks."""
        env = {"x": x.double(), **{name: t.double() for name, t in self.constants.items()}}
        if sizes:
            env = {name: t.abs() for name, t in env.items()}
        for node in self.nodes:
            if sizes and node.target in ACTIVATIONS:
                env[node.name] = env[node.args[0].name] + 1
            else:
                env[node.name] = resolve(node.target)(*fill(node.args, env))
        return env[self.nodes[-1].name]


def draw_network(rng):
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    if rng.random() < 0.4:
        lead = rng.choice([[1], [2], [4], [5], [8], [9], [33], [40], [3, 17], [70]])
        x = torch.randn(*lead, rng.randint(1, 70), dtype=dtype)
        net = Network(rng, x.shape, dtype)
        net.linear()
        for _ in range(rng.randint(0, 3)):
            rng.choice([net.linear, net.act])()
    else:
        sizes = [rng.choice([1, 1, 2, 5]), rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 20)]
        x = torch.randn(sizes, dtype=dtype)
        net = Network(rng, x.shape, dtype)
        net.conv()
        for _ in range(rng.randint(1, 4)):
            rng.choice([net.conv, net.conv, net.act, net.pool, net.twice])()
        if net.nodes and rng.random() < 0.3:
            net.add("aten.adaptive_avg_pool2d.default", net.last, [1, 1])
            net.add("aten.flatten.using_ints", net.last, 1)
            net.shape = net.shape[:2]
            net.linear()
    return net, x


def make_serve(rng):
    global last
    while True:
        net, x = draw_network(rng)
        if not net.nodes:
            continue
        specs = [pytree.tree_structure(tree) for tree in (((x,), {}), x)]
        graph = Graph(["x"], net.nodes, [net.last], net.constants, [list(x.shape)], [x.dtype], *specs, {}, {})
        plan = OptimizedModel(graph)._plan([x])
        if len(plan.merged) == 1 and plan.merged[0].program is not None:  # nothing is left to torch
            break
    (call,) = plan.merged
    arena = torch.full((plan.arena,), float("nan"), dtype=x.dtype)
    outputs = [torch.randn(shape, dtype=x.dtype) for _, shape in call.outputs]
    arguments = [arena, call.program, plan.ints, plan.values, [x] * len(call.inputs), outputs]
    # float32 has activations of its own, a few times its rounding off.
    value, bound = within(net.evaluate(x), net.evaluate(x, sizes=True), x.dtype, net.terms)
    last = [t.clone() for t in (*arguments[1:4], *arguments[4])], [(value, 4 * bound)]
    return arguments


def serve_reference(arena, program, ints, values, inputs, outputs):
    """A damaged plan that is no harm may give anything."""
    assert last is not None
    tensors, expected = last
    given = [program, ints, values, *inputs]
    same = len(given) == len(tensors) and all(map(torch.equal, given, tensors)) and len(outputs) == len(expected)
    same = same and all(y.shape == value.shape for y, (value, _) in zip(outputs, expected, strict=True))
    return [None, *(expected if same else [None] * len(outputs))]
