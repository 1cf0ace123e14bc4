"""Whatever others do to the tensors of a sparse layer: the next forward pass is right, or refuses."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import fuse_conv_bn_eval, parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import uasparse_kernels as ua
from uasparse_kernels.inference.capture import one_cudnn_precision

STORAGES = ["packed", "dense"]
REFUSED = "got some that came with another"


def layer(storage="packed", seed=0, sparsity=0.9, **kwargs):
    torch.manual_seed(seed)
    return ua.SparseLinear(300, 200, sparsity=sparsity, storage=storage, **kwargs)


def masked_output(module, x):
    return F.linear(x, module.pattern.unpack(module.pattern.pack(module.dense_weight())), module.bias)


def is_consistent(pattern):
    fresh = ua.SparsityPattern(pattern.shape, pattern.crow.clone(), pattern.col.clone(), block=pattern.block)
    return all(torch.equal(a, b) for a, b in zip(fresh.tensors(), pattern.tensors(), strict=True))


def moved(module, steps=1):
    """The layer after updates of its topology."""
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        ua.ops.prune_grow(module.weight, module.pattern, 0.3, grow="random", generator=generator)
    return module


# ---- averages ----


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999, 0.99998])
@pytest.mark.parametrize("make", [get_ema_avg_fn, get_ema_multi_avg_fn])
def test_an_average_over_buffers_of_a_fixed_pattern_keeps_it(storage, decay, make):
    model = layer(storage)
    averaged = AveragedModel(model, use_buffers=True, **{make.__name__.removeprefix("get_ema_"): make(decay)})
    for _ in range(20):
        averaged.update_parameters(model)
    assert averaged.module.pattern.equal(model.pattern) and is_consistent(averaged.module.pattern)
    x = torch.randn(5, 300)
    torch.testing.assert_close(averaged(x), model(x))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.99999])
def test_an_average_across_updates_refuses(storage, use_buffers, decay):
    model = layer(storage)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    averaged.update_parameters(model)
    moved(model)
    averaged.update_parameters(model)
    for use in (lambda: averaged(torch.randn(2, 300)), averaged.module.dense_weight, averaged.module.to_dense):
        with pytest.raises(RuntimeError, match=REFUSED):
            use()
    with pytest.raises(RuntimeError, match="signature"):
        layer().load_state_dict(averaged.module.state_dict())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_loop_over_state_dict_values(storage):
    """timm's ModelEmaV2, and copies into the values of a state_dict."""
    model = layer(storage)
    average = copy.deepcopy(model)
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.9999 * mine + (1 - 0.9999) * theirs)
    x = torch.randn(5, 300)
    assert average.pattern.equal(model.pattern) and is_consistent(average.pattern)
    torch.testing.assert_close(average(x), model(x))
    other = layer(storage, seed=1)
    for mine, theirs in zip(average.state_dict().values(), other.state_dict().values(), strict=True):
        mine.copy_(theirs)
    with pytest.raises(RuntimeError, match=REFUSED):
        average(x)
    average.load_state_dict(other.state_dict())  # as the message says
    torch.testing.assert_close(average(x), other(x))


@pytest.mark.parametrize("write", ["data", "numpy", "no_grad"])
def test_the_signature_is_compared_by_value(write):
    """Some ways to write to a tensor leave its version as it is."""
    module = layer()
    module(torch.randn(2, 300))
    if write == "data":
        module.pattern.signature.data.mul_(2)
    elif write == "numpy":
        module.pattern.signature.numpy()[:] = 1
    else:
        module.pattern.signature.mul_(2)
    with pytest.raises(RuntimeError, match=REFUSED):
        module(torch.randn(2, 300))


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.3, 0.7], [0.1] * 10, [0.9, 0.1]])
def test_checkpoints_averaged_key_by_key(weights):
    model, other = layer(), layer(seed=1)
    mean = {k: sum(w * v for w in weights) for k, v in model.state_dict().items()}
    other.load_state_dict(mean)
    assert other.pattern.equal(model.pattern)
    torch.testing.assert_close(other.weight, model.weight)
    first, second = model.state_dict(), layer(seed=2).state_dict()
    with pytest.raises(RuntimeError, match="average"):
        other.load_state_dict({k: 0.5 * first[k] + 0.5 * second[k] for k in first})
    assert other.pattern.equal(model.pattern)


# ---- moves, casts, copies, emptied and meta tensors ----


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("made", ["context", "argument", "skip_init", "emptied"])
def test_a_layer_made_without_memory_has_a_pattern(storage, made):
    if made == "context":
        with torch.device("meta"):
            module = layer(storage)
        module.to_empty(device="cpu")
    elif made == "skip_init":
        module = nn.utils.skip_init(ua.SparseLinear, 300, 200, sparsity=0.9, storage=storage)
    else:
        module = layer(storage, device="meta" if made == "argument" else None)
        module.to_empty(device="cpu")
    module.reset_parameters()
    assert module.pattern.num_blocks == 6000 and is_consistent(module.pattern)
    x = torch.randn(20, 300)
    torch.testing.assert_close(module(x), masked_output(module, x))
    module(x).sum().backward()
    assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source_sparsity", [0.9, 0.7])
def test_assignment_from_a_checkpoint_to_a_meta_model(storage, dtype, source_sparsity):
    source = layer("packed", sparsity=source_sparsity).to(dtype)
    with torch.device("meta"):
        module = layer(storage, seed=1)
    module.load_state_dict(source.state_dict(), assign=True)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert {str(t.device) for t in (*module.parameters(), *module.pattern.tensors())} == {"cpu"}
    x = torch.randn(20, 300, dtype=dtype)
    torch.testing.assert_close(module(x), source(x))
    assert module.storage == storage


def test_a_dense_checkpoint_is_assigned_under_the_own_pattern():
    dense = nn.Linear(300, 200)
    with torch.device("meta"):
        module = layer()
    module.load_state_dict(dense.state_dict(), assign=True)
    assert torch.equal(module.dense_weight(), dense.weight * module.pattern.to_mask())


def test_a_model_is_sparsified_on_the_meta_device():
    with torch.device("meta"):
        model = ua.sparsify(nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 5)), 0.5)
        assert model(torch.randn(2, 30)).shape == (2, 5)
    model.to_empty(device="cpu")
    for module in model:
        module.reset_parameters()
    assert model(torch.randn(2, 30)).isfinite().all()


def test_casts_copies_and_shared_memory_keep_the_pattern():
    module = layer()
    x, pattern = torch.randn(20, 300), copy.deepcopy(module.pattern)
    expected = module(x)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).share_memory()]
    copies += [copy.deepcopy(module).half().float(), copy.deepcopy(module).to(torch.bfloat16).float()]
    for copied in copies:
        assert copied.pattern.equal(pattern) and is_consistent(copied.pattern)
        assert copied.pattern.signature.dtype == torch.float64
        torch.testing.assert_close(copied(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("way", ["swap", "overwrite"])
def test_a_cast_that_makes_other_parameters(storage, way):
    model, x = layer(storage, sparsity=0.5), torch.randn(20, 300)
    expected = model(x).detach()
    choose = getattr(torch.__future__, f"set_{way}_module_params_on_conversion")
    choose(True)
    try:
        model.double().float()
    finally:
        choose(False)
    with torch.no_grad():
        if storage == "dense":
            model.weight.masked_fill_(~model.pattern.to_mask(), 1.0)
        torch.testing.assert_close(model(x), expected)


def test_what_is_another_patterns_stays_that_in_a_cast():
    module = layer()
    module.pattern.signature.mul_(2)
    with pytest.raises(RuntimeError, match=REFUSED):
        module.double()(torch.randn(2, 300).double())


# ---- state_dicts ----


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["values without a pattern", "a pattern without values", "no columns"])
def test_half_a_checkpoint_is_refused_and_changes_nothing(storage, strict, part):
    source, module = layer("packed"), layer(storage, seed=1)
    state = {k: v.clone() for k, v in source.state_dict().items()}
    before = {k: v.clone() for k, v in module.state_dict().items()}
    if part == "no columns":
        del state["pattern.col"]
    else:
        state = {k: v for k, v in state.items() if ("pattern" in k) == (part == "a pattern without values")}
    with pytest.raises(RuntimeError, match=r"pattern\."):
        module.load_state_dict(state, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_unexpected_keys_of_a_pattern_are_named():
    module = layer()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*pattern\.oddity"):
        module.load_state_dict(module.state_dict() | {"pattern.oddity": torch.zeros(1)})


@pytest.mark.parametrize("key", ["layout", "crow", "col", "signature"])
def test_any_changed_entry_of_a_saved_pattern_is_refused(key):
    torch.manual_seed(0)
    module = ua.SparseLinear(12, 8, sparsity=0.5)
    state, before = module.state_dict(), copy.deepcopy(module.state_dict())
    for place in range(state[f"pattern.{key}"].numel()):
        for change in (1, -1, 2**20):
            changed = {k: v.clone() for k, v in state.items()}
            changed[f"pattern.{key}"].view(-1)[place] += change
            with pytest.raises(RuntimeError, match="Expected"):
                module.load_state_dict(changed)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    with pytest.raises(RuntimeError, match=r"whole numbers|integers"):
        module.load_state_dict(state | {"pattern.col": state["pattern.col"] + 0.4})


def test_a_distributed_checkpoint_read_into_a_state_dict_alone_refuses(tmp_path):
    source, module = nn.Sequential(layer()), nn.Sequential(layer(seed=1))
    dcp.save(get_model_state_dict(source), checkpoint_id=tmp_path, no_dist=True)
    state = module.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        module(torch.randn(2, 300))
    set_model_state_dict(module, state)
    x = torch.randn(2, 300)
    torch.testing.assert_close(module(x), source(x))


@pytest.mark.parametrize("full", [False, True])
def test_the_names_of_a_wrapper_come_off_and_on_again(full):
    """torch's helpers do that for what they find as parameters and buffers."""
    options = StateDictOptions(full_state_dict=full)
    source, module = nn.Sequential(layer()), nn.Sequential(layer(seed=1))
    state = get_model_state_dict(torch.compile(source), options=options)
    assert state.keys() == source.state_dict().keys()
    set_model_state_dict(torch.compile(module), copy.deepcopy(state), options=options)
    x = torch.randn(2, 300)
    torch.testing.assert_close(module(x), source(x))
    # Values of another pattern, whose own is missing: that of the module does not take its place.
    other, before = nn.Sequential(layer(seed=2)), copy.deepcopy(module.state_dict())
    values = {key: value for key, value in other.state_dict().items() if "pattern" not in key}
    with pytest.raises(RuntimeError, match="pattern"):
        set_model_state_dict(module, values, options=StateDictOptions(full_state_dict=full, strict=False))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_functional_calls():
    module, other = layer(), layer(seed=1)
    x = torch.randn(20, 300)
    assert torch.equal(functional_call(module, module.state_dict(), x), module(x))
    with pytest.raises(ValueError, match="pattern's own indices"):
        functional_call(module, other.state_dict(), x)
    with pytest.raises(RuntimeError, match=REFUSED):
        functional_call(module, (dict(other.named_parameters()), dict(other.named_buffers())), x)
    torch.testing.assert_close(module(x), masked_output(module, x))


def test_ensembles_of_one_pattern_are_served_and_others_refused():
    models = [copy.deepcopy(layer()) for _ in range(3)]
    for i, model in enumerate(models):
        nn.init.normal_(model.bias, mean=i)
    x = torch.randn(20, 300)

    def run(models):
        return vmap(lambda p, b: functional_call(models[0], (p, b), x))(*stack_module_state(models))

    torch.testing.assert_close(run(models), torch.stack([model(x) for model in models]))
    with pytest.raises(RuntimeError, match=REFUSED):
        run([models[0], layer(seed=1)])


# ---- weights written from outside ----


def write_init(weight):
    nn.init.xavier_uniform_(weight)


def write_noise(weight):
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))


def write_data(weight):
    weight.data.normal_()


def write_new_data(weight):
    weight.data = torch.randn_like(weight)


def write_one_entry(weight):
    with torch.no_grad():
        weight[:, 7] = 3.0


def write_nan(weight):
    with torch.no_grad():
        weight.fill_(torch.nan)


@pytest.mark.parametrize("write", [write_init, write_noise, write_data, write_new_data, write_one_entry, write_nan])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("kind", ["linear", "conv", "block"])
def test_what_is_written_outside_of_the_pattern_counts_nowhere(write, rows, kind):
    torch.manual_seed(0)
    if kind == "conv":
        module, x = ua.SparseConv2d(8, 12, 3, sparsity=0.4, storage="dense"), torch.randn(rows, 8, 5, 6)
    else:
        block = (4, 4) if kind == "block" else (1, 1)
        module = ua.SparseLinear(40, 32, sparsity=0.4, block=block, storage="dense")
        x = torch.randn(rows, 40)
    mask = module.pattern.to_mask()
    with torch.no_grad():
        module(x)
    write(module.weight)
    written = torch.where(mask, module.weight.detach(), 0)
    assert torch.equal(copy.deepcopy(module).state_dict()["weight"].nan_to_num(7), written.nan_to_num(7))
    assert torch.equal(module.dense_weight().nan_to_num(7), written.nan_to_num(7))
    twin = F.linear if kind != "conv" else F.conv2d
    x.requires_grad_()
    out = module(x)
    expected = twin(x, written, module.bias)
    torch.testing.assert_close(out, expected, equal_nan=True)
    grad = torch.randn_like(out)
    (to_input,) = torch.autograd.grad(expected, x, grad)
    out.backward(grad)
    torch.testing.assert_close(x.grad, to_input, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert not (module.weight.grad[~mask] != 0).any()
    assert not (module.weight.detach()[~mask] != 0).any()


def test_an_entry_written_past_the_version_is_seen_in_the_end():
    """A write through ``.data`` has no version: each forward pass looks at other samples."""
    layers, x = [ua.SparseLinear(64, 96, sparsity=0.4, storage="dense") for _ in range(2)], torch.randn(3, 64)
    for layer in layers:
        layer(x)
        outside = (~layer.pattern.to_mask()).view(-1).nonzero().view(-1)
        layer.weight.data.view(-1)[outside[::300]] = 3.0
    for _ in range(500):  # one of 12 pieces a pass
        for layer in layers:
            layer(x)
    assert not any(layer.weight[~layer.pattern.to_mask()].any() for layer in layers)


@pytest.mark.parametrize("how", ["assign_", "set_blocks_", "fewer", "another"])
def test_a_pattern_that_changes_masks_a_dense_stored_weight_anew(how):
    layer, x = ua.SparseLinear(200, 300, sparsity=0.5, storage="dense"), torch.randn(64, 200)
    layer(x)
    blocks, inactive = layer.pattern.blocks(), (~layer.pattern.to_mask()).view(-1).nonzero().view(-1)
    blocks = blocks[2:] if how == "fewer" else torch.cat([blocks[2:], inactive[:2]]).sort().values
    other = ua.SparsityPattern.from_blocks((300, 200), blocks)
    if how == "assign_":
        layer.pattern.assign_(other)
    elif how == "another":
        layer.pattern = other
    else:
        layer.pattern.set_blocks_(blocks)
    expected = F.linear(x, layer.weight.detach() * other.to_mask(), layer.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("how", ["made", "copied", "unpickled"])
def test_the_weight_of_another_pattern_is_refused(storage, how):
    a, b = (ua.SparseLinear(20, 20, sparsity=0.5, storage=storage) for _ in range(2))
    if how != "made":
        a = copy.deepcopy(a) if how == "copied" else pickle.loads(pickle.dumps(a))
    before = b.weight
    with pytest.raises(ValueError, match="of a layer of another one"):
        b.weight = a.weight
    assert b.weight is before
    c = ua.SparseLinear(20, 20, pattern=a.pattern, storage=storage)
    c.weight = a.weight
    torch.testing.assert_close(c.dense_weight(), a.dense_weight())
    del a, c
    b.weight = nn.Parameter(torch.ones_like(b.weight))


def test_an_optimiser_that_moves_inactive_weights():
    """Momentum of the dense network, and updates that are not elementwise."""
    module = ua.SparseLinear(40, 32, sparsity=0.4, storage="dense")
    mask = module.pattern.to_mask()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    optimizer.state[module.weight]["momentum_buffer"] = torch.randn(32, 40)
    for _ in range(3):
        x = torch.randn(64, 40)
        out = module(x)
        torch.testing.assert_close(out, F.linear(x, module.weight * mask, module.bias))
        torch.testing.assert_close(out[:3], module(x[:3]))
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (module.to_dense().weight[~mask] == 0).all()


@pytest.mark.parametrize("rows", [2, 64])
def test_an_op_masks_a_weight_that_is_nobodys(rows):
    pattern = ua.SparsityPattern.random((32, 40), 0.7)
    weight = torch.randn(32, 40, dtype=torch.float64, requires_grad=True)
    before = weight.detach().clone()
    x = torch.randn(rows, 40, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ua.ops.masked_linear(x, weight, pattern), F.linear(x, weight * pattern.to_mask()))
    assert torch.autograd.gradcheck(lambda x, w: ua.ops.masked_linear(x, w, pattern), (x[:2], weight))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_substituted_weight_is_not_written_to(recorded):
    module = ua.SparseLinear(40, 32, sparsity=0.4, storage="dense")
    x, weight = torch.randn(64, 40), torch.randn(32, 40, requires_grad=recorded)
    scaled = weight * 2
    out = functional_call(module, {"weight": scaled}, x)
    torch.testing.assert_close(out, F.linear(x, scaled * module.pattern.to_mask(), module.bias))
    assert torch.equal(scaled, weight * 2)


@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
def test_every_substituted_weight_is_masked(kind):
    """Also one that lies where another lay before."""
    module, x = ua.SparseLinear(64, 64, sparsity=0.5, storage="dense"), torch.randn(32, 64)
    outside = (~module.pattern.to_mask()).view(-1).nonzero().view(-1)

    def changed(place):
        weight = module.weight.detach().clone()
        weight.view(-1)[place] += 1.0
        return {"weight": weight if kind is torch.Tensor else nn.Parameter(weight)}

    with torch.no_grad():
        expected = module(x)
        for place in outside[:300].tolist():
            assert torch.equal(functional_call(module, changed(place), x), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_parameters_of_another_layer_substituted(storage):
    module, other = layer(storage, sparsity=0.5), layer(storage, seed=1, sparsity=0.5)
    before, x = other.weight.detach().clone(), torch.randn(20, 300)
    with pytest.raises(ValueError, match="of a layer of another one"):
        functional_call(module, dict(other.named_parameters()), x)
    assert torch.equal(other.weight, before)
    same = ua.SparseLinear(300, 200, pattern=module.pattern, storage=storage)
    torch.testing.assert_close(functional_call(module, dict(same.named_parameters()), x), same(x))
    torch.testing.assert_close(module(x), masked_output(module, x))


# ---- parametrisations, fusion, tracing ----


@pytest.mark.parametrize(
    ("storage", "name"),
    [("packed", "spectral_norm"), ("packed", "weight_norm"), *(("dense", n) for n in ("spectral_norm", "orthogonal"))],
)
def test_parametrisations_are_refused_and_change_nothing(storage, name):
    module = layer(storage)
    with pytest.raises(RuntimeError, match="cannot be parametrised"):
        getattr(parametrizations, name)(module)
    assert type(module) is ua.SparseLinear and isinstance(module.weight, nn.Parameter)
    x = torch.randn(3, 300)
    torch.testing.assert_close(module(x), masked_output(module, x))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm"])
def test_the_older_norms_are_refused_for_packed_weights(name):
    module = layer()
    getattr(nn.utils, name)(module)
    with pytest.raises(RuntimeError, match="cannot be parametrised"):
        module(torch.randn(3, 300))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("channels", [4, 8])
def test_a_batch_norm_is_fused_into_a_dense_copy(storage, channels):
    conv = ua.SparseConv2d(channels, 16, 1, bias=False, sparsity=0.75, storage=storage).eval()
    norm = nn.BatchNorm2d(16).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, channels, 6, 6)
    torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )
    return ua.sparsify(model, 0.8).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["fx", "trace", "export", "script", "onnx"])
def test_graphs_of_a_sparse_model(how):
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    if how == "fx":
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    elif how == "trace":
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    elif how == "export":
        buffer = io.BytesIO()
        with one_cudnn_precision():  # which the tests' own setting is not
            torch.export.save(torch.export.export(model, (x,)), buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.export.load(buffer).module()(x), expected)
    elif how == "script":
        with pytest.raises(RuntimeError, match="densify"):
            torch.jit.script(model)
    else:
        with pytest.raises(RuntimeError, match="densify"):
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)


# ---- derivatives ----


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sparsity", [0.2, 0.8])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_transforms_have_every_derivative(storage, sparsity, kind):
    if kind == "linear":
        module, x = ua.SparseLinear(8, 6, sparsity=sparsity, storage=storage), torch.randn(40, 8)
    else:
        module, x = ua.SparseConv2d(4, 6, 3, sparsity=sparsity, storage=storage), torch.randn(5, 4, 6, 5)
    module, x = module.double(), x.double()
    weight, pattern = module.weight.detach(), module.pattern
    dense = module.to_dense()
    tangent = torch.randn_like(weight)
    spread = pattern.unpack(tangent) if storage == "packed" else tangent * pattern.to_mask()

    def call(w):
        return functional_call(module, {"weight": w}, x)

    _, moved = torch.func.jvp(call, (weight,), (tangent,))
    _, expected = torch.func.jvp(lambda w: functional_call(dense, {"weight": w}, x), (dense.weight,), (spread,))
    torch.testing.assert_close(moved, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        out = torch.autograd.forward_ad.unpack_dual(call(dual)).tangent
    torch.testing.assert_close(out, expected)
    slope = torch.func.grad(lambda w: call(w).square().sum())(weight)
    wanted = torch.func.grad(lambda w: functional_call(dense, {"weight": w}, x).square().sum())(dense.weight.detach())
    torch.testing.assert_close(slope, pattern.pack(wanted) if storage == "packed" else wanted * pattern.to_mask())
    samples = vmap(lambda s: torch.func.grad(lambda w: functional_call(module, {"weight": w}, s[None]).sum())(weight))(
        x
    )
    assert samples.shape == (len(x), *weight.shape)
