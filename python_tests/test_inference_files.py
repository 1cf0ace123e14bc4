"""Files of sparse models: read back as written, small, and refused where damaged."""

import json

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.inference import files


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
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)


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
