"""Files of sparse models: read back as written, small, and refused where damaged."""

import copy
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.inference import files
from uasparse_kernels.inference.compact import Compact, dense


def model(sparsity=0.9, block=(1, 1), storage="packed"):
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 12))
    return ua.sparsify(layers, sparsity, distribution="uniform", block=block, storage=storage).eval()


@pytest.mark.parametrize("storage", ["packed", "dense"])
@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_sparse_models(tmp_path, storage, sparsity):
    torch.manual_seed(0)
    source = model(sparsity)
    ua.save_sparse(source, tmp_path / "a")
    target = ua.load_sparse(model(0.8, storage=storage), tmp_path / "a")
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(target(x), source(x))
    assert target[2].pattern.nnz == source[2].pattern.nnz and target[2].storage == storage
    dense = ua.load_sparse(ua.densify(model()), tmp_path / "a")
    torch.testing.assert_close(dense(x), source(x))


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_active_weights_that_are_zero_stay_active(tmp_path, storage):
    """Those that were just grown; all of a delta that was not trained yet."""
    source = nn.Sequential(model(0.6, storage=storage), ua.nn.SparseDelta(nn.Linear(12, 12), 0.3))
    layers = [source[0][2], source[0][4], source[1].delta]
    with torch.no_grad():
        for layer in layers[:2]:
            layer.weight.view(-1)[::3] = 0.0
    ua.save_sparse(source, tmp_path / "a")
    target = nn.Sequential(model(0.8, storage=storage), ua.nn.SparseDelta(nn.Linear(12, 12), 0.1))
    ua.load_sparse(target, tmp_path / "a")
    for layer, wanted in zip((target[0][2], target[0][4], target[1].delta), layers, strict=True):
        assert layer.pattern.equal(wanted.pattern) and torch.equal(layer.dense_weight(), wanted.dense_weight())
    ua.save_sparse(source[0], tmp_path / "b")
    dense = ua.load_sparse(ua.densify(model()), tmp_path / "b")
    assert torch.equal(dense[4].weight, source[0][4].dense_weight())
    tensors, content = files.read(tmp_path / "b")
    for bad in (torch.tensor([1 << 40]), torch.tensor([-1]), torch.tensor([0.5])):
        files.write(tmp_path / "c", tensors | {"4.weight#zeros": bad}, content)
        with pytest.raises(ValueError, match="places of active zeros"):
            ua.load_sparse(model(), tmp_path / "c")


def test_blocks_stay_and_must_take_the_weights(tmp_path):
    source = model(0.5, block=(4, 4))
    ua.save_sparse(source, tmp_path / "a")
    target = model(0.5, block=(4, 4))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(ValueError, match="zeros outside"):
        ua.load_sparse(target, tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 1.0])
def test_tensors_of_all_densities(tmp_path, dtype, density):
    tensors = {
        "a": torch.randn(37, 61).mul(torch.rand(37, 61) < density).to(dtype),
        "b": torch.arange(5),
        "c": torch.tensor(3.0),
        "d": torch.zeros(0, 4),
    }
    files.write(tmp_path / "a", tensors, {"x": 1})
    got, metadata = files.read(tmp_path / "a")
    assert metadata == {"x": 1} and got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(dense(got[name]), tensor)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a"
    ua.save_sparse(model(), path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    changed = []
    for edit in (
        lambda h: h["0.weight"].update(shape=[1 << 40]),
        lambda h: h["0.weight"].update(dtype="F16"),
        lambda h: h["0.weight"].update(data_offsets=[-4, 8]),
        lambda h: h["0.weight"].pop("dtype"),
        lambda h: h["__metadata__"].update(format="uasparse_kernels sparse 99"),
        lambda h: h["__metadata__"].update(sparse=json.dumps({"nothing": {"shape": [3]}})),
        lambda h: h["__metadata__"].update(sha256="0" * 64),
    ):
        other = json.loads(json.dumps(header))
        edit(other)
        text = json.dumps(other).encode()
        changed.append(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    cut = [b"", whole[:5], whole[:100], whole[:-1], whole + b"\0", b"\xff" * 64, bytes(flipped)]
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    for data in [*changed, *cut]:
        path.write_bytes(data)
        with pytest.raises(ValueError):
            ua.load_sparse(target, path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """A file of weights and one of an optimised model, as bytes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    source = model()
    ua.save_sparse(source, folder / "sparse")
    ua.optimize_for_inference(source, torch.randn(1, 3, 5, 5)).save(folder / "optimized")
    return {name: (folder / name).read_bytes() for name in ("sparse", "optimized")}


@pytest.mark.parametrize("kind", ["sparse", "optimized"])
@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_or_a_cut_anywhere_is_refused(tmp_path, whole_files, kind, seed):
    whole = whole_files[kind]
    generator = torch.Generator().manual_seed(seed)
    length = 8 + int.from_bytes(whole[:8], "little")
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}

    def draw(stop):
        return int(torch.randint(stop, (), generator=generator))

    damaged = []
    # The length of the header, the header, and all.
    for stop in (*range(seed, 64, 8), *[8 * length] * 40, *[8 * len(whole)] * 20):
        bit = stop if stop < 64 else draw(stop)
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    damaged += [whole[: draw(len(whole))] for _ in range(10)]
    damaged += [whole[: (at := draw(len(whole)))] + whole[at + 8 :], whole + whole[:8], whole[8:]]
    for data in damaged:
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError, match=r"a: expected a whole safetensors file of this version, got"):
            ua.load_sparse(target, tmp_path / "a") if kind == "sparse" else ua.load_optimized(tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def plain(header, body=b""):
    """A file of any header, which says nothing of us and has no hash."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        (1 << 63).to_bytes(8, "little") + b"{}",
        plain(b"[" * 100_000),
        plain(b'{"a":' * 100_000),
        plain(b"9" * 10_000),
        plain([]),
        plain({"a": 5}),
        plain({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 0]}}),
        plain({"a": {"dtype": "F32", "shape": [0] * 100_000, "data_offsets": [0, 0]}}),
        plain({"a": {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}),
        plain({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"1234"),
        plain({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}, b"1234"),
        plain({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}, b"1234"),
        plain({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, b"1234"),
        plain({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        plain({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}, b"1234"),
        plain({"__metadata__": 3}),
        plain({"__metadata__": {"format": 3}}),
        plain({"__metadata__": {"format": files.FORMAT}}),
        plain({"__metadata__": {"sha256": 3}}),
        plain({"__metadata__": {"sparse": "[]"}}),
        plain({"__metadata__": {"sparse": "[" * 100_000}}),
        plain({"__metadata__": {"sparse": '{"a": {"shape": 3}}'}}),
        plain({"__metadata__": {"content": "[]"}}),
        *[
            plain(
                {
                    "a#values": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
                    "a#" + place: {
                        "dtype": "I32" if place == "indices" else "U8",
                        "shape": [0],
                        "data_offsets": [0, 0],
                    },
                    "__metadata__": {"sparse": json.dumps({"a": {"shape": [1 << 28, 1 << 28]}})},
                }
            )
            for place in ("indices", "bitmask", "nothing")
        ],
    ],
    ids=range(26),
)
def test_headers_that_are_bombs_or_nonsense_are_refused(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    for load in (ua.load_optimized, lambda path: ua.load_sparse(nn.Linear(1, 1), path)):
        with pytest.raises(ValueError, match="expected a whole safetensors file of this version"):
            load(tmp_path / "a")


def test_another_version_is_named(tmp_path):
    (tmp_path / "a").write_bytes(plain({"__metadata__": {"format": "uasparse_kernels sparse 1"}}))
    with pytest.raises(ValueError, match="format 'uasparse_kernels sparse 1', where this version writes 'uasparse_"):
        ua.load_optimized(tmp_path / "a")


@pytest.mark.parametrize(
    "edit",
    [
        lambda g: g.pop("nodes"),
        lambda g: g.update(more=1),
        lambda g: g["nodes"].append(["x", "aten.from_file.default", ["/etc/passwd"], {"map": {}}]),
        lambda g: g["nodes"].append(["x", "uasparse.serve_run.default", [], {"map": {}}]),
        lambda g: g["nodes"].append(["x", "builtins.eval", ["1"], {"map": {}}]),
        lambda g: g["nodes"].append(["x", "aten.nothing.default", [], {"map": {}}]),
        lambda g: g["nodes"].append(["x", "operator.add", [{"ref": "nothing"}, 1], {"map": {}}]),
        lambda g: g["nodes"].append(["x", "operator.add", [{"torch": "load"}, 1], {"map": {}}]),
        lambda g: g["nodes"][0].pop(),
        lambda g: g.update(in_spec="[1"),
        lambda g: g.update(names=3),
    ],
)
def test_graphs_that_are_none_are_refused(tmp_path, edit):
    """Rightly hashed, so written by somebody on purpose."""
    optimized = ua.optimize_for_inference(model(), torch.randn(1, 3, 5, 5))
    content = {"kind": "optimized", "graph": files.graph_to_json(optimized._graph)}
    edit(content["graph"])
    files.write(tmp_path / "a", optimized._graph.constants, content)
    with pytest.raises(ValueError, match="is damaged: its graph cannot be run"):
        ua.load_optimized(tmp_path / "a")


def test_a_file_serves_machines_with_other_instructions(tmp_path):
    optimized = ua.optimize_for_inference(model(), torch.randn(1, 3, 5, 5))
    optimized.save(tmp_path / "a")
    program = "import sys, torch, uasparse_kernels as ua; from uasparse_kernels import _library\n"
    program += "assert _library.compiled.cpu_isa() == 'portable'\n"
    program += "print(ua.load_optimized(sys.argv[1])(torch.arange(150.).cos().view(2, 3, 5, 5)).flatten().tolist())"
    environment = os.environ | {"UASPARSE_CPU_ISA": "portable"}
    command = [sys.executable, "-c", program, tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    x = torch.arange(150.0).cos().view(2, 3, 5, 5)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)).view(2, 12), optimized(x))


def test_a_loaded_model_keeps_its_weights_once(tmp_path):
    net = nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(576, 300)).eval()
    for layer in (net[0], net[3]):
        layer.weight.data *= torch.rand(layer.weight.shape) < 0.1
    x = torch.randn(2, 8, 5, 5)
    optimized = ua.optimize_for_inference(net, x)
    optimized.save(tmp_path / "a")
    for model in (optimized, ua.load_optimized(tmp_path / "a")):
        torch.testing.assert_close(model(x), net(x))
        layers = [step for step in model._steps if hasattr(step, "stored")]
        assert len(layers) == 2 and all(isinstance(layer.stored, Compact) for layer in layers)
        assert all(isinstance(model._graph.constants[name], Compact) for name in model._graph.names
                   if model._graph.names[name] in ("0.weight", "3.weight"))  # fmt: skip
        assert not model._constants and not any("kept_weight" in vars(layer) for layer in layers)


def test_a_process_that_serves_imports_no_compiler(tmp_path):
    optimized = ua.optimize_for_inference(model(), torch.randn(1, 3, 5, 5))
    optimized.save(tmp_path / "a")
    program = """
import sys, torch, uasparse_kernels as ua
optimized = ua.load_optimized(sys.argv[1])
x = torch.arange(150.).cos().view(2, 3, 5, 5)
y = optimized(x)
assert not {"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()
# One that is imported later is kept out.
graphs = []
def count(module, inputs):
    graphs.append(module)
    return module
z = torch.compile(lambda x: optimized(x.neg()).relu(), backend=count)(x)
torch.testing.assert_close(z, optimized(-x).relu())
assert len(graphs) == 2 and all(len(g.graph.nodes) == 3 for g in graphs), [g.graph for g in graphs]
"""
    command = [sys.executable, "-c", program, tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_files_of_other_models(tmp_path):
    ua.save_sparse(model(), tmp_path / "a")
    with pytest.raises(ValueError, match="missing in the file"):
        ua.load_sparse(nn.Linear(3, 4), tmp_path / "a")
    with pytest.raises(ValueError, match="no optimised model"):
        ua.load_optimized(tmp_path / "a")


def test_readers_of_the_format_read_the_parts(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    ua.save_sparse(model(), tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert "2.weight#values" in file.keys()  # noqa: SIM118


def test_active_zeros_of_a_transposed_layer(tmp_path):
    """Its weight in the pattern's shape is a view that is not contiguous."""
    source, target = (ua.nn.SparseTransposedLinear(16, 24, sparsity=sparsity) for sparsity in (0.6, 0.8))
    with torch.no_grad():
        source.weight.view(-1)[::3] = 0.0
    ua.save_sparse(source, tmp_path / "a")
    ua.load_sparse(target, tmp_path / "a")
    assert target.pattern.equal(source.pattern) and torch.equal(target.dense_weight(), source.dense_weight())


class Noted(nn.Module):
    """A layer with a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.layer, self.note = nn.Linear(3, 3), 0

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def test_a_state_that_a_file_cannot_hold_is_refused_before_anything_changes(tmp_path):
    ua.save_sparse(nn.ModuleDict({"layer": nn.Linear(3, 3)}), tmp_path / "a")
    noted = Noted()
    before = noted.layer.weight.detach().clone()
    meta = nn.Sequential(nn.Linear(3, 3)).to("meta")
    optimized = ua.optimize_for_inference(model(), torch.randn(1, 3, 5, 5))
    for odd, error, message in (
        (noted, TypeError, "got a dict for '_extra_state'"),
        (meta, ValueError, r"got 0\.weight on meta: call model\.to_empty"),
        (model().to("meta"), ValueError, r"on meta: call model\.to_empty"),
        (noted.state_dict(), TypeError, r"Expected a model \(nn\.Module\), got a OrderedDict"),
        (nn.Sequential(optimized), ValueError, r"got an optimised one at '0': .*its save\(path\)"),
    ):
        with pytest.raises(error, match=message):
            ua.save_sparse(odd, tmp_path / "b")
        with pytest.raises(error, match=message):
            ua.load_sparse(odd, tmp_path / "a")
    assert torch.equal(noted.layer.weight, before) and [file.name for file in tmp_path.iterdir()] == ["a"]
    for method in (optimized.state_dict, lambda: optimized.load_state_dict(model().state_dict())):
        with pytest.raises(RuntimeError, match="no state_dict"):
            method()


def test_odd_names_and_buffers(tmp_path):
    def named(name, buffer):
        module = nn.Module()
        module.register_buffer(name, buffer)
        module.register_buffer("sparse", torch.eye(16))
        return module

    for name in ("0" * 64, "\u00e9 \n#", "#", "sparse#value"):
        ua.save_sparse(named(name, torch.ones(3)), tmp_path / "a")
        assert ua.load_sparse(named(name, torch.zeros(3)), tmp_path / "a").get_buffer(name).sum() == 3
    for name in ("__metadata__", "sparse#values", "x#bitmask", "x#zeros"):
        with pytest.raises(ValueError, match=f"other names than .* the file's format uses itself, got {name!r}"):
            ua.save_sparse(named(name, torch.ones(3)), tmp_path / "b")
    with pytest.raises(TypeError, match=r"Expected a dense tensor with values for 'x', got torch\.sparse_coo"):
        ua.save_sparse(named("x", torch.eye(3).to_sparse()), tmp_path / "b")
    ua.save_sparse(named("x", torch._neg_view(torch.ones(3))), tmp_path / "a")
    assert torch.equal(ua.load_sparse(named("x", torch.ones(3)), tmp_path / "a").x, -torch.ones(3))


def test_a_link_stays_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "a" / "weights")
    for value in (1.0, 2.0):
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, value)
        ua.save_sparse(model, tmp_path / "latest")
        assert (tmp_path / "latest").is_symlink()
        assert ua.load_sparse(nn.Linear(1, 1), tmp_path / "a" / "weights").weight == value


def test_threads_that_write_one_file(tmp_path):
    """As the processes of a distributed run may; a write that fails leaves nothing behind."""
    written, wrong = model(), []

    def write():
        try:
            for _ in range(10):
                ua.save_sparse(written, tmp_path / "a")
                ua.load_sparse(copy.deepcopy(written), tmp_path / "a")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        ua.save_sparse(written, tmp_path / "folder")
    assert not wrong and sorted(file.name for file in tmp_path.iterdir()) == ["a", "folder"]
