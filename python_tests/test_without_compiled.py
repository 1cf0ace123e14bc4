"""Without the compiled parts the package imports with one warning, and everything works on the references."""

import subprocess
import sys
import warnings

import pytest
import torch

from uasparse_kernels import _compiled, _library
from uasparse_kernels._compiled import built_for

SCRIPT = """
import sys, warnings
import torch
sys.modules["uasparse_kernels._C_torch" + "_".join(torch.__version__.split(".")[:2])] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import uasparse_kernels as ua
told = [w for w in caught if "compiled kernels could not be loaded" in str(w.message)]
assert len(told) == 1, [str(w.message) for w in caught]
assert not ua.backend_info()["compiled"]

def train(storage, method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5)
    )
    model = ua.sparsify(model, 0.7, storage=storage, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    loss_fn = ua.UnknownAwareLoss(4, warmup_epochs=1, total_epochs=3)
    topology = ua.DynamicSparsity(model, optimizer, method=method, total_steps=40, delta_t=5)
    x, y = torch.randn(24, 2, 8, 8), torch.arange(24) % 4
    losses = []
    for step in range(40):
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert {row.kernel for row in ua.explain(model, x)} == {"reference"}
    return losses

for method in ("rigl", "set"):
    packed, dense = train("packed", method), train("dense", method)
    assert packed[-1] < 0.7 * packed[0], packed
    assert all(0 <= value < 10 for value in dense)
print("fine")
"""


def test_everything_works_on_the_references():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "fine"


def test_the_build_that_is_here_is_found():
    here = ".".join(torch.__version__.split(".")[:2])
    assert (here in _compiled.built_for()) == (_library.compiled is not None)


def test_a_build_for_another_torch_is_not_loaded(monkeypatch):
    """Only files of other versions' names lie there: one line says what was built, what is here and what to do."""
    monkeypatch.setattr(_compiled, "built_for", lambda: ["2.9", "2.10"])
    with pytest.raises(ImportError) as told:
        _compiled.load("_C_torch9_99")
    assert str(told.value).startswith("uasparse_kernels was built for torch 2.9 and 2.10, but torch ")
    assert torch.__version__ in str(told.value) and "install torch 2.10, or build" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_build_for_this_torch_that_does_not_load_is_said(monkeypatch):
    """A file of this torch's name that is broken is no other version's: the references serve, with a warning."""
    monkeypatch.setattr(_compiled, "built_for", lambda: ["9.99"])
    with pytest.warns(RuntimeWarning, match="could not be loaded"):
        assert _compiled.load("_C_torch9_99") is None


def test_sources_that_hide_the_installed_package_are_said(monkeypatch, tmp_path):
    """After `pip install .` Python finds the sources first where it is started in their folder."""
    installed = tmp_path / "site-packages" / "uasparse_kernels"
    installed.mkdir(parents=True)
    (installed / "_C_torch9_99.abi3.so").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed.parent)])
    monkeypatch.setattr(_compiled, "built_for", lambda folder=None: built_for(folder) if folder else [])
    with pytest.warns(RuntimeWarning, match=r"before .*site-packages.*, which has them.* in another folder"):
        assert _compiled.load("_C_torch9_99") is None


def test_sources_that_changed_since_the_build_are_said(monkeypatch, tmp_path):
    package, sources = tmp_path / "uasparse_kernels", tmp_path / "csrc"
    package.mkdir()
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu" / "op.cpp").write_text("int a;")
    monkeypatch.setattr(_compiled, "FOLDER", package)
    monkeypatch.setattr(_compiled.importlib, "import_module", lambda name: "loaded")
    (package / f"{_compiled.NAME}.digest").write_text(_compiled.digest_of(sources))
    (sources / "cpu" / ".op.cpp.swp").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _compiled.load() == "loaded"
    (sources / "cpu" / "op.cpp").write_text("int b;")
    with pytest.warns(RuntimeWarning, match="csrc has changed since .* pip install --no-build-isolation -e"):
        assert _compiled.load() == "loaded"


def test_which_torch_a_package_was_built_for(tmp_path):
    for name in ("_C_torch2_9.abi3.so", "_C_torch2_14.abi3.so", "_C_torch2_14.so", "_C.abi3.so", "_library.py"):
        (tmp_path / name).touch()
    assert _compiled.built_for(tmp_path) == ["2.9", "2.14"]
