"""What transformers and single rows run on: attention, layer norm, views of maps, and weights that are looked up."""

import copy

import pytest
import torch
from test_inference import alone, check, error, prune
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.inference.graph import Ref

pytestmark = pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part")


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("out, columns, density", [(64, 64, 0.3), (129, 300, 0.1), (500, 2047, 0.02), (200, 97, 0.001)])
def test_a_few_rows(batch, out, columns, density):
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, columns, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) < density
    weight[: out // 3] *= torch.rand(out // 3, 1, generator=generator) < 0.5  # rows of very different counts
    bias, x = torch.randn(out, generator=generator), torch.randn(batch, columns, generator=generator)
    model = alone("aten.linear.default", [Ref("x"), Ref("w"), Ref("b")], {"w": weight, "b": bias}, x,
                  [("aten.gelu.default", ())])  # fmt: skip
    wanted = nn.functional.gelu(nn.functional.linear(x.double(), weight.double(), bias.double()))
    assert error(model(x), wanted) < 1e-6
    if model._plan([x]).calls[0].entry.kernel.endswith("looked up"):
        torch.set_num_threads(2)
        again = model(x)
        torch.set_num_threads(1)
        assert torch.equal(again, model(x))


class Attention(nn.Module):
    """As timm, Hugging Face and torch write it, and with keys from elsewhere."""

    def __init__(self, how, width, heads):
        super().__init__()
        self.how, self.heads = how, heads
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-3, elementwise_affine=False)
        self.qkv, self.q, self.k = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.pool = nn.Linear(width, width)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        batch, time, width = x.shape
        each = width // self.heads
        y = self.norm(self.pool(x))
        if self.how == "timm":
            q, k, v = self.qkv(y).reshape(batch, time, 3, self.heads, each).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "chunks":
            q, k, v = (p.view(batch, time, self.heads, each).transpose(1, 2) for p in self.qkv(y).chunk(3, dim=-1))
        else:
            q, k = (layer(y).view(batch, time, self.heads, each).transpose(1, 2) for layer in (self.q, self.k))
            v = self.k(y).view(batch, time, self.heads, each).transpose(1, 2)
        if self.how == "fewer keys":
            k, v = k[:, :, 2:], v[:, :, 2:]
        z = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3 if self.how == "chunks" else None)
        z = self.out(z.transpose(1, 2).reshape(batch, time, width)) + x
        return self.after(nn.functional.gelu(z)), z[:, 0], z[:, -1:]


@pytest.mark.parametrize("how", ["timm", "chunks", "separate", "fewer keys"])
@pytest.mark.parametrize("time, width, heads", [(17, 60, 3), (50, 64, 4), (11, 36, 1)])
def test_attention(how, time, width, heads):
    torch.manual_seed(time)
    model = prune(Attention(how, width, heads), 0.7)
    optimized = ua.optimize_for_inference(model, torch.randn(1, time, width))
    exact = copy.deepcopy(model).double()
    for batch in (1, 2, 5):
        x = torch.randn(batch, time, width)
        with torch.no_grad():
            wanted = exact(x.double())
        for got, right in zip(optimized(x), wanted, strict=True):
            assert got.shape == right.shape and error(got, right) < 2e-6
        by_torch = {s.reason for s in optimized.explain(x) if s.kernel == "torch"}
        assert not by_torch & {"aten.scaled_dot_product_attention.default", "aten.layer_norm.default"}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoders_of_torch(first, batch_first):
    torch.manual_seed(0)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        layer = nn.TransformerEncoderLayer(48, 3, 100, activation="gelu", batch_first=batch_first, norm_first=first)
        model = prune(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.7)
        check(model, (19, 48), batches=(1, 2, 5), bound=2e-6)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_float64_and_large_scores():
    torch.manual_seed(0)
    model = prune(Attention("timm", 60, 3).double(), 0.5)
    x = torch.randn(3, 17, 60, dtype=torch.float64)
    for factor in (1.0, 300.0):  # scores of thousands: the softmax takes its maximum off
        with torch.no_grad():
            model.qkv.weight *= factor
            wanted = model(x)
        for got, right in zip(ua.optimize_for_inference(model, x)(x), wanted, strict=True):
            assert error(got, right) < 1e-8


class Views(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(24, 24), nn.Linear(24, 24), run

    def forward(self, x):
        return self.run(self, self.a(x))


@pytest.mark.parametrize(
    "run",
    [
        lambda m, y: m.b(y.transpose(0, 1)),
        lambda m, y: m.b(y.transpose(0, 1).reshape(-1, 24)).relu(),
        lambda m, y: m.b(y.transpose(0, 1)).transpose(0, 1) + y,
        lambda m, y: m.b(y.transpose(0, 1)) + y.transpose(0, 1),
        lambda m, y: m.b(y[:, 1:]),
        lambda m, y: m.b(y.reshape(y.shape[0], 4, 3, 24)[:, :, -1]),
        lambda m, y: torch.cat(y.split([8, 16], dim=-1)[::-1], -1),
        lambda m, y: y[..., 3:9].relu() + y[..., 3:9],
        lambda m, y: y[..., 3:9] + y[..., 4:10],
        lambda m, y: y.unflatten(-1, (2, 12)).permute(2, 0, 3, 1).flatten(2),
        lambda m, y: m.b(y.transpose(1, 2).reshape(-1, 12, 24)),
        lambda m, y: (y.select(1, -2), y.unsqueeze(1).squeeze(1)),
        lambda m, y: nn.functional.layer_norm(y.transpose(0, 1), (24,)),
        lambda m, y: nn.functional.layer_norm(y, (12, 24)),
        lambda m, y: nn.functional.layer_norm(y[..., :12], (12,)),
    ],
)
def test_views(run):
    torch.manual_seed(0)
    model = prune(Views(run), 0.7)
    optimized = ua.optimize_for_inference(model, torch.randn(2, 12, 24))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 12, 24)
        with torch.no_grad():
            wanted = model(x)
        torch.testing.assert_close(optimized(x), wanted, rtol=1e-5, atol=1e-5)
