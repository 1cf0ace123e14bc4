"""Inference of sparse networks beside engines that run them dense, all with the same weights.

A row's result is compared with the dense network's in the same run. Rivals (pip install onnx onnxruntime openvino):
ONNX Runtime and OpenVINO; with one thread and batch 1 torch in its two layouts too; and at 90 % torch.compile, which
takes most of a minute for a network. Calls are timed as they are under load, after some milliseconds of the same;
"after other work" is the second call after the other engines' (networks of a millisecond).

UASPARSE_SERVE_NETWORKS=resnet50,mlp takes some of the networks only. With UASPARSE_CPU_ISA=avx2 the rivals are to be
held there too: ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 hold torch and OpenVINO;
nothing holds ONNX Runtime, which then stands apart. One thread only.

Weights are pruned at random, uniformly: all convolutions and linear layers but a network's first convolution and
depthwise ones. "dense in-projections" keeps those of the attention, a third of a ViT's work, dense.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import uasparse_kernels as ua
from benchmarks import harness

SPARSITIES = (0.8, 0.9, 0.95)
DENSE_IN = "vit_b_16, dense in-projections"
SMALL = ("mlp",)  # whose calls take less than a millisecond
WARM = 0.005  # seconds of calls before a timed one
REST = 0.2  # seconds before another engine's turn with two threads: ONNX Runtime's spin for some 50 ms after a call
HELD = os.environ.get("UASPARSE_CPU_ISA") == "avx2"


def bert() -> nn.Module:
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


def mlp() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(2048, 2048), nn.ReLU())])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "resnet50": (torchvision.models.resnet50, (3, 224, 224), (1, 8, 32)),
    "resnet18": (torchvision.models.resnet18, (3, 224, 224), (1,)),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, (3, 224, 224), (1,)),
    "mlp": (mlp, (2048,), (1, 128)),
    "vit_b_16": (torchvision.models.vit_b_16, (3, 224, 224), (1,)),
    DENSE_IN: (torchvision.models.vit_b_16, (3, 224, 224), (1,)),
    "bert_base_encoder_128": (bert, (128, 768), (1,)),
}


def run(seconds: float) -> list[dict[str, Any]]:
    torch.backends.mha.set_fastpath_enabled(False)  # its op has no ONNX form
    # OpenVINO counts the cores that it may use once, at its first call: here, where none is kept from it.
    harness.pin(None)
    for call in rivals(nn.Linear(8, 8).eval(), torch.randn(1, 8), torch_too=False).values():
        call()
    return harness.rows(_rows(seconds))


def _rows(seconds: float) -> Iterator[dict[str, Any]]:
    wanted = os.environ.get("UASPARSE_SERVE_NETWORKS", "").split(",")
    for name, (build, size, batches) in NETWORKS.items():
        if wanted != [""] and name.split(",")[0] not in wanted:
            continue
        for sparsity in SPARSITIES:
            torch.manual_seed(0)
            model = prune(build(), sparsity, in_projections=name != DENSE_IN)
            optimized = ua.optimize_for_inference(model, torch.randn(1, *size))
            for batch in batches:
                if (batch == 32 and sparsity != 0.9) or (HELD and batch in (8, 32)):  # throughput: half a minute a row
                    continue
                x = torch.randn(batch, *size)
                for threads in (1,) if HELD else (1, 2):
                    yield _row(name, model, optimized, x, sparsity, threads, seconds)


def _row(
    name: str, model: nn.Module, optimized: Callable[..., Any], x: Tensor, sparsity: float, threads: int, seconds: float
) -> dict[str, Any]:
    harness.pin(threads)
    torch.set_num_threads(threads)
    variants: dict[str, Callable[[], Any]] = {"ours": lambda: optimized(x)}
    variants |= rivals(model, x, threads == 1 and len(x) == 1, sparsity == 0.9 and name != DENSE_IN and not HELD)
    with torch.inference_mode():
        difference = optimized(x) - (wanted := model(x))
        error = (difference.norm() / wanted.norm()).item()
        rest = REST if threads > 1 else 0
        times = harness.interleave(variants, seconds=seconds, rounds=5, rest=rest, warm=WARM)
        after = harness.interleave(variants, seconds=seconds, rest=rest) if name in SMALL and len(x) == 1 else {}
    if not error < 1e-5:
        raise AssertionError(f"{name}: relative error {error:.1e}")
    harness.pin(1)
    torch.set_num_threads(1)
    shape = f"{name}, batch {len(x)}" + (f", {threads} threads," if threads > 1 else "")
    row = {"shape": shape, "pass": "inference", "sparsity": sparsity, "threads": threads, "error": error}
    row |= {"per_second": len(x) / times["ours"]} | harness.compare(times)
    if after:
        row["ms_after_other_work"] = {variant: 1e3 * value for variant, value in after.items()}
        row["after_other_work"] = harness.compare(after)["speedup_over"]["dense"]
    return row


@torch.no_grad()
def prune(model: nn.Module, sparsity: float, in_projections: bool = True) -> nn.Module:
    """The model with random weights left, as a dense one: the rivals run it too."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear) and not module.weight.any():  # a head that starts at zero
            module.weight.normal_(0, 0.02)

    def is_pruned(name: str, module: nn.Module) -> bool:
        return getattr(module, "groups", 1) == 1 and (in_projections or not name.endswith("in_proj"))

    return ua.densify(ua.sparsify(model, sparsity, distribution="uniform", filter=is_pruned)).eval()


def rivals(
    model: nn.Module, x: Tensor, torch_too: bool = True, compiled_too: bool = False
) -> dict[str, Callable[[], Any]]:
    threads = torch.get_num_threads()
    found: dict[str, Callable[[], Any]] = {}
    if torch_too:
        found["dense torch"] = lambda: model(x)
    if torch_too and x.dim() == 4:
        last = x.to(memory_format=torch.channels_last)
        found["dense torch, channels last"] = lambda: model(last)
    if torch_too and compiled_too:
        torch._dynamo.reset()
        compiled = torch.compile(model, options={"freezing": True})
        try:
            with torch.inference_mode():
                compiled(x)
            found["dense torch.compile"] = lambda: compiled(x)
        except Exception as error:
            print(f"torch.compile: {error!r:.200}")
    try:
        import onnxruntime
    except ImportError:
        return found or {"dense torch": lambda: model(x)}
    file = to_onnx(model, x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    found["ONNX Runtime with AVX-512" if HELD else "dense ONNX Runtime"] = lambda: session.run(None, feed)
    try:
        import openvino
    except ImportError:
        return found
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(file, b""), "CPU", settings).create_infer_request()
    found["dense OpenVINO"] = lambda: request.infer([x.numpy()])
    return found


def to_onnx(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    return file.getvalue()
