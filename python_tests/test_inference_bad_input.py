"""Optimised models in the hands of people who read no manual: each call is right, or refused with what was expected."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.inference import files, run

pytestmark = pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part")
X = torch.randn(2, 3, 12, 14)


def prune(model, sparsity=0.8):
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data *= torch.rand(module.weight.shape) >= sparsity
    return model.eval()


def network():
    """Sparse layers, and steps of torch before and between them."""
    return prune(nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2),
        nn.GroupNorm(4, 32), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def both():
    model = network()
    return model, ua.optimize_for_inference(model, X)


@torch.no_grad()
def close(got, model, *inputs):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model(*inputs), rtol=1e-4, atol=1e-5)


def test_inputs_of_every_layout(both):
    model, optimized = both
    for x in (
        X.to(memory_format=torch.channels_last), X[:1].expand(5, -1, -1, -1), torch.randn(2, 3, 24, 28)[..., ::2, ::2],
        torch.randn(2, 3, 14, 12).transpose(2, 3), X.flip(0), torch._neg_view(X), torch.complex(X, X).conj().imag,
        nn.Parameter(X, requires_grad=False), torch.cat([X, X[:1]]), X[:1],
    ):  # fmt: skip
        close(optimized(x), model, x)
    with torch.inference_mode():
        close(optimized(X * 1), model, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_other_dtypes(both, dtype):
    with pytest.raises(TypeError, match=r"of dtype torch\.float32, got"):
        both[1](X.to(dtype))


def test_no_state_of_the_process_changes_a_result(both):
    model, optimized = both
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 10 * 12, 5)).eval()
    for model, optimized in (both, (layers, ua.optimize_for_inference(layers, X))):
        with torch.autocast("cpu", torch.bfloat16):
            got = optimized(X)
            optimized.explain(X)
        close(got, model, X)
        with torch.device("meta"):
            got = optimized(X)
        close(got, model, X)
        torch.set_default_dtype(torch.float64)
        try:
            got = optimized(X)
        finally:
            torch.set_default_dtype(torch.float32)
        close(got, model, X)


def test_what_is_not_a_dense_tensor_by_position(both):
    _, optimized = both
    for x, got in [
        (X.to_sparse(), "sparse_coo"), (X.to("meta"), "meta"), (X.numpy(), "ndarray"), ([X], "list"), (None, "None"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"to be a dense tensor on the CPU, got .*{got}"):
            optimized(x)
    for call in (lambda: optimized(), lambda: optimized(X, X), lambda: optimized(input=X), lambda: optimized(X, x=X)):
        with pytest.raises(ValueError, match=r"Expected 1 inputs, by position .*, got \d by position and \d by name"):
            call()
    with pytest.raises(ValueError, match=r"got \[0, 3, 12, 14\]; the batch is 1 or more"):
        optimized(X[:0])


def test_derivatives_are_refused_and_results_may_be_trained_on(both):
    model, optimized = both
    wanting = X.clone().requires_grad_()

    def dual(x):
        with forward_ad.dual_level():
            return optimized(forward_ad.make_dual(x, x))

    for call in (
        lambda: optimized(wanting),
        lambda: torch.func.jvp(optimized, (X,), (X,)),
        lambda: torch.func.jacrev(optimized)(X),
        lambda: torch.func.grad(lambda x: optimized(x).sum())(X),
        lambda: torch.vmap(optimized)(X[None]),
        lambda: dual(X),
    ):
        with pytest.raises(ValueError, match="not to require gradients, for an optimised model computes none"):
            call()
    with torch.no_grad():
        close(optimized(wanting), model, X)
    head = nn.Linear(10, 3)
    head(optimized(X)).sum().backward()
    torch.testing.assert_close(head.weight.grad, model(X).sum(0).expand(3, -1).detach(), rtol=1e-4, atol=1e-4)
    optimized(X).add_(1)
    close(optimized(X), model, X)


@pytest.mark.filterwarnings("ignore")
def test_what_would_capture_an_optimised_model(both):
    _, optimized = both
    with pytest.raises(RuntimeError, match=r"package\(\).*densify"):
        torch.jit.trace(optimized, X)
    for model in (optimized, nn.Sequential(optimized).eval()):
        with pytest.raises(ValueError, match="weights of its own, got an optimised one"):
            ua.optimize_for_inference(model, X)


def test_copies(both):
    model, optimized = both
    file = io.BytesIO()
    torch.save(optimized, file)
    file.seek(0)
    copies = [
        copy.copy(optimized), copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized)),
        torch.load(file, weights_only=False),
    ]  # fmt: skip
    for other in copies:
        close(other(X), model, X)
        close(other(X[:1]), model, X[:1])
        with pytest.raises(ValueError, match="no training mode"):
            nn.Sequential(other).train()


def test_the_model_may_change_afterwards():
    model = network()
    optimized = ua.optimize_for_inference(model, X)
    wanted = optimized(X)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    model.train()
    assert torch.equal(optimized(X), wanted)
    torch.testing.assert_close(optimized(torch.cat([X, X])), torch.cat([wanted, wanted]), rtol=1e-4, atol=1e-5)


class ByName(nn.Module):
    """One layer used twice; results of several kinds, one of them twice, an input and a weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        y = self.layer(self.layer(inputs["x"]).relu())
        return {"y": y, "more": [self.layer(inputs["y"]), None, 3], "same": (y, inputs["x"], self.scale)}


def test_nested_inputs_and_results(tmp_path):
    model, x, y = prune(ByName(), 0.5), torch.randn(3, 8), torch.randn(3, 8)
    optimized = ua.optimize_for_inference(model, ({"x": x, "y": y},))
    optimized.save(tmp_path / "a")
    for again in (optimized, ua.load_optimized(tmp_path / "a")):
        for inputs in ({"x": x, "y": y}, {"y": y, "x": x}, {"y": y[:1], "x": x[:1]}):
            torch.testing.assert_close(again(inputs), model(inputs), rtol=1e-5, atol=1e-5)
        for arguments in (({"x": x, "z": y},), (x, y), ({"x": x},), ([x, y],)):
            with pytest.raises(ValueError, match="Expected 2 inputs, by position and nested as in the example"):
                again(*arguments)
        with pytest.raises(ValueError, match=r"got \[2, 8\]; the batch is 1 or more, the same for all inputs"):
            again({"x": x, "y": y[:2]})


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, more=None):
        return self.layer(x) if more is None else self.layer(x + more)


def test_arguments_that_cannot_be_captured_and_batches_of_one():
    model, x, one = prune(Scaled(), 0.5), torch.randn(3, 8), torch.randn(1, 8)
    for more in (None, 2.0):
        with pytest.raises(ValueError, match=r"Expected tensors as inputs, got .* leave it out, or wrap the model"):
            ua.optimize_for_inference(model, (x, more))
    close(ua.optimize_for_inference(model, (x, one))(x[:2], one), model, x[:2], one)
    with pytest.raises(ValueError, match=r"of shape \[batch, 8\], got \[1, 8\]; the batch is .* same for all"):
        ua.optimize_for_inference(model, (x[:1], one))(x, one)  # whose batch is one and whose is none is not to be told
    with pytest.raises(ValueError, match="does it begin with a layer of inplace=True"):
        ua.optimize_for_inference(nn.Sequential(nn.ReLU(inplace=True), model).eval(), x)


class Of(nn.Module):
    """A model whose forward is a function of its layer and any number of inputs."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, *inputs):
        return self.function(self.layer, *inputs)


def test_any_number_of_inputs_of_which_some_have_no_batch():
    x, table = torch.randn(3, 8), torch.randn(2, 8)
    model = prune(Of(lambda layer, x, y: layer(x) + y.sum(0)))
    optimized = ua.optimize_for_inference(model, (x[:1], table))
    for batch in (1, 3):
        close(optimized(x[:batch], table), model, x[:batch], table)
    model = prune(Of(lambda layer, x, y: layer(x) + y))
    close(ua.optimize_for_inference(model, (x, x))(x[:2], x[1:]), model, x[:2], x[1:])


def squeezed(layer, x):
    return layer(x).squeeze()


def apart(layer, x):
    return layer(x) if x.shape[0] > 1 else 2 * layer(x)


def no_batch_of_one(layer, x):
    assert x.shape[0] > 1
    return layer(x)


@pytest.mark.parametrize("function", [squeezed, apart, no_batch_of_one])
def test_a_model_that_treats_a_batch_of_one_apart(function, tmp_path):
    model, x = prune(Of(function)), torch.randn(3, 8)
    optimized = ua.optimize_for_inference(model, x)
    optimized.save(tmp_path / "a")
    for served in (optimized, ua.load_optimized(tmp_path / "a")):
        close(served(x), model, x)
        close(served(x[:2]), model, x[:2])
        with pytest.raises(ValueError, match=r"got \[1, 8\]; the batch is 2 or more.* a batch of 1 apart"):
            served(x[:1])
    with pytest.raises(ValueError, match="a batch of at least 2"):
        optimized.package(tmp_path / "a.pt2", batch=1)
    with pytest.raises(ValueError, match=r"treats a batch of 1 apart.*dynamic_batch=False"):
        ua.optimize_for_inference(model, x[:1])
    if function is not no_batch_of_one:
        close(ua.optimize_for_inference(model, x[:1], dynamic_batch=False)(x[:1]), model, x[:1])


def test_random_numbers_and_infinities_are_no_batch_of_one_apart():
    x = torch.randn(3, 8)
    noisy = ua.optimize_for_inference(Of(lambda layer, x: layer(x) + torch.rand_like(x)).eval(), x)
    assert noisy(x[:1]).shape == (1, 8)
    wild = Of(lambda layer, x: torch.stack([layer(x).log(), x / 0, x * 1e38 * 1e38])).eval()
    close(ua.optimize_for_inference(wild, x)(x[:1]).nan_to_num(7), Of(lambda _, x: wild(x).nan_to_num(7)), x[:1])


def test_a_batch_norm_without_variance_is_as_torch_has_it():
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0.0), nn.ReLU()))
    model[1].running_var[3], model[1].running_mean[3] = 0.0, 0.1
    got, wanted = ua.optimize_for_inference(model, X)(X), model(X).detach()
    assert not wanted.isfinite().all()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_control_flow_and_named_results(tmp_path):
    x = torch.randn(3, 8)
    branching = prune(Of(lambda layer, x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (layer(x),))))
    optimized = ua.optimize_for_inference(branching, x)
    for sign in (x.abs(), -x.abs(), -x[:1].abs()):
        close(optimized(sign), branching, sign)
    with pytest.raises(TypeError, match=r"holds torch's control flow \(as torch\.cond\), which a file cannot"):
        optimized.save(tmp_path / "a")
    named = prune(Of(lambda layer, x: layer(x).topk(2)))
    optimized = ua.optimize_for_inference(named, x)
    torch.testing.assert_close(copy.deepcopy(optimized)(x[:2]).values, named(x[:2]).values.detach())
    with pytest.raises(TypeError, match=r"a structure that a file cannot hold; use tuples"):
        optimized.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_threads_that_all_come_at_once_with_every_batch():
    model = network()
    optimized = ua.optimize_for_inference(model, X)
    inputs = {batch: torch.randn(batch, 3, 12, 14) for batch in range(1, 13)}
    with torch.no_grad():
        wanted = {batch: model(x) for batch, x in inputs.items()}
    wrong = []

    def call(number):
        try:
            for batch in list(inputs)[:: 1 if number % 2 else -1]:
                torch.testing.assert_close(optimized(inputs[batch]), wanted[batch], rtol=1e-4, atol=1e-5)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(optimized._arenas) <= 6  # not one for each size that was ever asked for


def test_a_file_of_another_torch(tmp_path):
    optimized = ua.optimize_for_inference(network(), X)
    content = {"kind": "optimized", "graph": files.graph_to_json(optimized._graph), "torch": "2.99.0"}
    files.write(tmp_path / "a", optimized._graph.constants, content)
    assert torch.equal(ua.load_optimized(tmp_path / "a")(X), optimized(X))  # its graph is known here
    content["graph"]["nodes"][-1][1] = "aten.linear_of_tomorrow.default"
    files.write(tmp_path / "a", optimized._graph.constants, content)
    with pytest.raises(ValueError, match=r"was written with torch 2\.99\.0, and this torch, .* optimise and save"):
        ua.load_optimized(tmp_path / "a")


def test_a_batch_in_parts_is_the_whole_batch(monkeypatch):
    """Large batches run in parts, of one sample here, unless something but the samples depends on the batch."""
    monkeypatch.setattr(run, "_NEAR_BYTES", 1)
    for function, sizes in (
        (lambda layer, x: layer(x) + x.shape[0], [8]),
        (lambda layer, x: layer(x).reshape(x.shape[0], -1, 2), [8]),
        (lambda layer, x, y: layer(x)[:, :1] + y, [8]),  # [N, 1] and [N] make [N, N]
        (lambda layer, x: (layer(x), x.shape[0]), [8]),
    ):
        inputs = [torch.randn(3, *sizes), torch.randn(3)][: function.__code__.co_argcount - 1]
        model = prune(Of(function), 0.5)
        optimized = ua.optimize_for_inference(model, tuple(inputs))
        for batch in (1, 2, 3, 40):
            given = [t.repeat(14, *[1] * (t.dim() - 1))[:batch] for t in inputs]
            torch.testing.assert_close(optimized(*given), model(*given), rtol=1e-4, atol=1e-5)


def test_a_batch_norm_over_another_dimension_than_the_channels():
    x = torch.randn(3, 6, 8)
    for features in (6, 5):  # as many as the norm has, and others
        model = prune(nn.Sequential(nn.Linear(8, features), nn.BatchNorm1d(6), nn.ReLU()), 0.5)
        model[1].running_mean.normal_()
        close(ua.optimize_for_inference(model, x)(x), model, x)
    model = prune(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm1d(8)), 0.5)  # of images without a batch
    model[1].running_mean.normal_()
    x = torch.randn(6, 8, 9)
    close(ua.optimize_for_inference(model, x, dynamic_batch=False)(x), model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_sum_with_another_dtype(rows, dtype):
    x, y = torch.randn(rows, 8), torch.randn(rows, 8) * 5
    model = prune(Of(lambda layer, x, y: (layer(x) + y, (y + layer(x)).relu())), 0.5)
    within = prune(Of(lambda layer, x, y: (lambda z: (layer(x) + z, (z + layer(x)).relu()))(y.to(dtype))), 0.5)
    torch.testing.assert_close(ua.optimize_for_inference(within, (x, y))(x, y), within(x, y), rtol=1e-4, atol=1e-5)
    if not dtype.is_floating_point:  # an input of it
        optimized = ua.optimize_for_inference(model, (x, y.to(dtype)))
        torch.testing.assert_close(optimized(x, y.to(dtype)), model(x, y.to(dtype)), rtol=1e-4, atol=1e-5)


def test_parts_without_numbers():
    model = prune(
        nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), Of(lambda _, y: (torch.cat([y[:, 1:], y], 1), y[:, 1:])))
    )
    for got, wanted in zip(ua.optimize_for_inference(model, X)(X), model(X), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    model = prune(nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), Of(lambda _, y: y.split([1, 0], 1))))
    assert [list(y.shape) for y in ua.optimize_for_inference(model, X)(X)] == [[2, 1, 12, 14], [2, 0, 12, 14]]


def test_results_and_constants_share_no_memory():
    outside = torch.ones(8)
    model = prune(Of(lambda layer, x: (lambda y: (y, y.clone(), y[:, 1:] + 0))((layer(x) * outside).transpose(1, 2))))
    x = torch.randn(2, 40, 8)
    optimized = ua.optimize_for_inference(model, x)
    one = ua.optimize_for_inference(prune(Of(lambda layer, x: (lambda y: (y, y.clone()))(layer(x).transpose(1, 2)))), x)
    wanted = [y.clone() for y in optimized(x)]
    outside.zero_()
    for served in (optimized, one):
        first, *others = served(x)
        before = [y.clone() for y in others]
        first.zero_()
        assert all(torch.equal(y, z) for y, z in zip(others, before, strict=True))
    assert all(torch.equal(y, z) for y, z in zip(optimized(x), wanted, strict=True))


def test_a_default_device_is_not_that_of_a_served_model(tmp_path):
    model = network()
    optimized = ua.optimize_for_inference(model, X)
    optimized.save(tmp_path / "a")
    ua.save_sparse(model, tmp_path / "b")
    with torch.device("meta"):
        again = ua.load_optimized(tmp_path / "a")
        results = optimized(X), again(X), ua.load_sparse(copy.deepcopy(model), tmp_path / "b")(X)
    for got in results:
        close(got, model, X)
