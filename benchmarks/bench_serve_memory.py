"""Memory of a process that serves: a 90 % sparse ResNet-50 from a file, beside ONNX Runtime, which runs it dense.

Each is a fresh process that imports what it needs, loads the file and runs it three times with batch 1. What a process
has after its imports is counted apart from what comes on top, at the peak: the imports depend on how torch was built
(one for CUDA maps several times as much as one for the CPU), and other parts of a program may need them anyway.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision

import uasparse_kernels as ua
from benchmarks import harness
from benchmarks.bench_serve import prune, to_onnx

_OURS = """
import torch, uasparse_kernels as ua
torch.set_num_threads(1)
x = torch.zeros(1, 3, 224, 224)
before = status("VmRSS")
model = ua.load_optimized({path!r})
for _ in range(3): model(x)
"""
_THEIRS = """
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
x = numpy.zeros((1, 3, 224, 224), numpy.float32)
before = status("VmRSS")
session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])
for _ in range(3): session.run(None, {{session.get_inputs()[0].name: x}})
"""
_STATUS = """
import re
status = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
"""


def run(seconds: float) -> list[dict[str, Any]]:
    return harness.rows([memory()])


def memory() -> dict[str, Any]:
    """In MiB: after the imports, what came on top at the peak, and the peak."""
    torch.manual_seed(0)
    model = prune(torchvision.models.resnet50(), 0.9)
    row: dict[str, Any] = {
        "shape": "resnet50, batch 1",
        "pass": "memory",
        "sparsity": 0.9,
        "imports_mib": {},
        "grown_mib": {},
        "peak_mib": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "net.safetensors"), Path(folder, "net.onnx")
        ua.optimize_for_inference(model, torch.zeros(1, 3, 224, 224)).save(ours)
        theirs.write_bytes(to_onnx(model, torch.zeros(1, 3, 224, 224)))
        for name, code, path in (("ours", _OURS, ours), ("ONNX Runtime", _THEIRS, theirs)):
            code = _STATUS + code.format(path=str(path)) + "print(before, status('VmHWM'))"
            result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            if name == "ours":
                result.check_returncode()
            if result.returncode == 0:  # else there is no such rival
                before, peak = (float(value) for value in re.findall(r"[\d.]+", result.stdout))
                row["imports_mib"][name], row["grown_mib"][name], row["peak_mib"][name] = before, peak - before, peak
    return row
