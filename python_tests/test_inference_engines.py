"""Sparse models outside of this package: ONNX, AOTInductor's packages, and a C++ program without Python."""

import copy
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pages
import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.inference import run
from uasparse_kernels.inference.capture import one_cudnn_precision

pytestmark = pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part")
ROOT = pages.ROOT


@pytest.fixture(autouse=True)
def _exporters_precision():
    with one_cudnn_precision():  # which the tests' own setting is not
        yield


class Block(nn.Module):
    """A layer between steps of torch whose map is read later: a call of the kernels without tensors in and out."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(16, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        z = self.norm(x)
        y = self.a(x)
        return y + self.b(z.roll(1, 2))


def network():
    """Sparse layers, steps of torch before, between and after them."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), Block(), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        nn.Softmax(1),
    )  # fmt: skip
    model[1].running_mean.normal_(0, 0.1)
    return ua.sparsify(model, 0.8, distribution="uniform").eval()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = ua.SparseLinear(24, 16, sparsity=0.8)

    def forward(self, x, index):
        y = self.layer(x).relu()
        return {"y": y, "one": y.gather(1, index)}


@pytest.mark.filterwarnings("ignore")
def test_a_densified_model_in_onnx_runtime():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = network(), torch.randn(2, 3, 12, 14)
    dense = ua.densify(copy.deepcopy(model))
    program = torch.onnx.export(dense, (x,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    optimized = ua.optimize_for_inference(model, x)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 12, 14)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(got), optimized(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_exported_says_what_can():
    pytest.importorskip("onnxscript")
    model, x = network(), torch.randn(2, 3, 12, 14)
    optimized = ua.optimize_for_inference(model, x)
    for dynamo in (False, True):
        with pytest.raises(Exception, match=r"densify\(copy\.deepcopy\(model\)\).*optimize_for_inference"):
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)
    with pytest.raises(Exception, match=r"package\(\).*densify"):
        torch.onnx.export(optimized, (x,), io.BytesIO(), dynamo=True, verbose=False)
    with pytest.raises(RuntimeError, match=r"package\(\).*densify"):
        torch.export.export(optimized, (x,))


@pytest.mark.parametrize("near", [run._NEAR_BYTES, 1])  # 1: each sample by itself
def test_a_package_is_made_of_the_models_own_steps(tmp_path, monkeypatch, near):
    """The graph that is compiled, run by Python: the compiler's part is in the test below."""
    monkeypatch.setattr(run, "_NEAR_BYTES", near)
    graphs = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **_: graphs.append(program))
    sparse, tokens = network(), TwoInputs().eval()
    for model, example, batch in [
        (sparse, (torch.randn(1, 3, 12, 14),), 3),
        (copy.deepcopy(sparse).double(), (torch.randn(1, 3, 12, 14).double(),), 1),
        (tokens, (torch.randn(5, 24), torch.randint(16, (5, 1))), 4),
    ]:
        optimized = ua.optimize_for_inference(model, example)
        optimized.package(tmp_path / "net.pt2", batch)
        inputs = [t.repeat(batch, *[1] * (t.dim() - 1))[:batch] for t in example]
        got, expected = graphs[-1].module()(*inputs), optimized(*inputs)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        calls = [node for node in graphs[-1].graph.nodes if node.target == torch.ops.uasparse.serve_run.default]
        assert calls and all(inputs and outputs for *_, inputs, outputs in (call.args for call in calls))
        assert not any(node.target == torch.ops.aten.conv2d.default for node in graphs[-1].graph.nodes)
    with pytest.raises(ValueError, match=r"ends in \.pt2, got 'net\.onnx'"):
        optimized.package("net.onnx")
    with pytest.raises(ValueError, match="batch of at least 1, got 0"):
        optimized.package("net.pt2", 0)


@pytest.mark.filterwarnings("ignore")
def test_the_serving_page_and_its_program_without_python(tmp_path, monkeypatch, capsys):
    """All blocks but those of a trained run (test_training_export.py)."""
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("serve"))
    ops = Path(_library.compiled.__file__)
    (tmp_path / "uasparse_kernels").symlink_to(ops.parent)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable, "CXXFLAGS": "-O0 -Wall -Wextra -Werror"}
    namespace = {"torch": torch, "model": network(), "images": torch.randn(3, 3, 224, 224)}
    for heading, blocks in pages.sections("docs/serving.md"):
        if heading != "A trained run":
            pages.run(blocks, namespace, tmp_path, environment)
    assert "LayerTime(layer='4'" in capsys.readouterr().out and Path("net.onnx").is_file()
    got = torch.frombuffer(bytearray(Path("logits.f32").read_bytes()), dtype=torch.float32)
    torch.testing.assert_close(got, namespace["optimized"](namespace["images"][:1])[0], rtol=1e-5, atol=1e-6)

    with zipfile.ZipFile("net.pt2") as whole, zipfile.ZipFile("other.pt2", "w") as other:
        about = [item for item in whole.infolist() if b'"uasparse_isa"' in whole.read(item)]
        for item in whole.infolist():
            data = whole.read(item)
            other.writestr(item, data.replace(_library.compiled.cpu_isa().encode(), b"vax") if item in about else data)
    assert about

    x = torch.zeros(2, 3, 224, 224)
    for library, package, message in [
        (ops, "net.pt2", "expected: 1, but got: 2"),
        ("/nowhere.so", "net.pt2", "cannot open"),
        (ops, "net.onnx", "zip"),
        (ops, "other.pt2", "expected a package for this machine, got one for vax"),
    ]:
        command = ["examples/serve_cpp/serve", library, package, *map(str, x.shape)]
        done = subprocess.run(command, input=x.numpy().tobytes(), capture_output=True, env=environment, timeout=60)
        assert done.returncode == 1 and message in done.stderr.decode()
    # As on a machine that lacks the kernels' instructions: forced, as no other is at hand.
    command = ["examples/serve_cpp/serve", ops, "net.pt2", *map(str, x[:1].shape)]
    done = subprocess.run(command, input=x[:1].numpy().tobytes(), capture_output=True, timeout=60,
                          env=environment | {"UASPARSE_CPU_ISA": "portable"})  # fmt: skip
    refused = b"a package for a machine of portable instructions" in done.stderr
    assert refused == (_library.compiled.cpu_isa() != "portable") == (done.returncode == 1)


def test_a_package_needs_a_compiler(tmp_path, monkeypatch):
    def refuse(program, **_):
        raise torch._inductor.exc.InvalidCxxCompiler()

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    optimized = ua.optimize_for_inference(nn.Linear(4, 3).eval(), torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        optimized.package(tmp_path / "net.pt2")
