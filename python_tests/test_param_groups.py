"""Weight decay of packed weights, and optimisers that look at weights as matrices."""

import importlib

import pytest
import torch
from torch import nn

import uasparse_kernels as ua


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.conv = nn.Conv2d(1, 16, 3, bias=False)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
        self.position = nn.Parameter(torch.zeros(1, 3, 16))
        self.special = nn.Parameter(torch.ones(4, 4))
        self.special._no_weight_decay = True
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def no_weight_decay(self):
        return {"position"}


def named(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


@pytest.mark.parametrize("options", [None, {}, {"storage": "packed"}, {"storage": "dense"}, {"block": (4, 4)}])
def test_sparse_weights_decay_as_dense_ones(options):
    model = nn.ModuleDict({"model": Model()})
    if options is not None:
        ua.sparsify(model, 0.5, distribution="uniform", overrides={"model.conv": {"block": (1, 1)}}, **options)
    groups = ua.param_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decays, stays = named(model, groups)
    assert decays == {"model.embed.weight", "model.conv.weight", "model.body.0.weight", "model.body.2.weight"}
    stay = {"model.position", "model.special", "model.body.0.bias", "model.body.2.bias", "model.body.1.weight"}
    assert stays == stay | {"model.body.1.bias"}
    decays, stays = named(model, ua.param_groups(model, 0.05, no_decay=["model.embed.weight"]))
    assert "model.embed.weight" in stays - decays
    before = [p.detach().clone() for p in groups[0]["params"]]
    optimizer = torch.optim.SGD(groups, 1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for now, then in zip(groups[0]["params"], before, strict=True):
        torch.testing.assert_close(now.detach(), 0.95 * then)


def test_the_rule_is_that_of_timm():
    timm = pytest.importorskip("timm.optim")
    dense = Model()
    theirs = timm.param_groups_weight_decay(dense, 0.05, no_weight_decay_list=dense.no_weight_decay())
    no_decay, decay = named(dense, theirs)
    assert named(dense, ua.param_groups(dense, 0.05)) == [decay - {"special"}, no_decay | {"special"}]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="weight_decay >= 0"):
        ua.param_groups(Model(), -1.0)
    with pytest.raises(ValueError, match="'positoin'"):
        ua.param_groups(Model(), 0.1, no_decay=["positoin"])


# ---- optimisers that treat matrices in a way of their own ----


class Matrixwise(torch.optim.SGD):
    """Keeps momentum of the weight's shape, so that its state alone does not tell."""

    def __init__(self, params, **group):
        super().__init__([{"params": list(params), **group}], 0.1, momentum=0.9)


def named_class(name):
    return type(name, (Matrixwise,), {})


@pytest.mark.parametrize(
    "name", ["SingleDeviceMuonWithAuxAdam", "Muon", "DistributedShampoo", "SOAP", "Kron", "CAME", "AdafactorBigVision"]
)
def test_they_are_refused_on_matrices_only(name):
    for options, refused in [({"storage": "packed"}, False), ({"storage": "dense"}, True), ({"block": (4, 4)}, True)]:
        model = ua.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, **options)
        make = named_class(name)
        if not refused:
            ua.DynamicSparsity(model, make(model.parameters()), method="set", total_steps=9, delta_t=1)
            continue
        with pytest.raises(ValueError, match=f'{name[:4]}.*storage="packed"'):
            ua.DynamicSparsity(model, make(model.parameters()), method="set", total_steps=9, delta_t=1)
        for group in ({"use_muon": False}, {"use_fallback": True}):
            ua.DynamicSparsity(model, make(model.parameters(), **group), method="set", total_steps=9, delta_t=1)


@pytest.mark.parametrize("name", ["Muon", "Kron", "AdafactorBigVision", "Lion", "Adopt", "Lamb", "NAdamW", "Mars"])
def test_timms_optimizers_move_with_packed_weights_or_refuse(name):
    timm = pytest.importorskip("timm.optim")
    model = ua.sparsify(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)), 0.5, storage="packed")
    cls = getattr(timm, name, None) or importlib.import_module("timm.optim.kron").Kron
    optimizer = cls(ua.param_groups(model, 0.0), lr=1e-3)
    topology = ua.DynamicSparsity(model, optimizer, method="set", total_steps=9, delta_t=2, stop_fraction=1)
    kept = [layer.pattern.nnz for layer in (model[0], model[2])]
    try:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 24)).square().sum().backward()
            optimizer.step()
            topology.step()
    except ValueError as error:
        assert name == "Kron" and "cannot move with the weights" in str(error)
    assert kept == [layer.pattern.nnz for layer in (model[0], model[2])]


def test_quantised_state_is_refused():
    class Quantised(torch.Tensor):
        pass

    model = ua.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, storage="packed")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = ua.DynamicSparsity(model, optimizer, method="set", total_steps=9, delta_t=1)
    model(torch.randn(3, 8)).sum().backward()
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros_like(model[0].weight.detach()).as_subclass(Quantised)
    before = model[0].pattern.blocks()
    with pytest.raises(ValueError, match="Quantised"):
        topology.step()
    assert torch.equal(model[0].pattern.blocks(), before)


@pytest.mark.parametrize(
    ("rule", "storage", "said"),
    [
        (lambda p: p.dim() >= 2, "packed", "0, 2"),
        (lambda p: p.dim() >= 2, "dense", None),  # its weights have two dimensions
        (lambda p: True, "packed", None),
        (lambda p: False, "packed", None),  # no decay anywhere
    ],
)
def test_a_rule_by_dimensions_is_noticed(rule, storage, said, caplog):
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    ua.sparsify(model, 0.5, distribution="uniform", storage=storage)
    decayed = [p for p in model.parameters() if rule(p)]
    others = [p for p in model.parameters() if not rule(p)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    groups = groups if decayed or said else groups[1:]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    ua.DynamicSparsity(model, optimizer, method="rigl", total_steps=1000)
    lines = [record.getMessage() for record in caplog.records if "The optimizer decays" in record.getMessage()]
    assert len(lines) == (said is not None) and all(f"ones of {said}. " in line for line in lines)


def test_own_groups_leave_nothing_to_say(caplog):
    model = ua.sparsify(Model(), 0.5)
    optimizer = torch.optim.AdamW(ua.param_groups(model, weight_decay=0.1), lr=1e-3)
    ua.DynamicSparsity(model, optimizer, method="static", total_steps=1000)
    assert "The optimizer decays" not in caplog.text


def test_a_shared_parameter_goes_by_each_of_its_names():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 16), "head": nn.Linear(16, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    for name in ("embed.weight", "head.weight"):
        decayed, others = ua.param_groups(model, 0.1, no_decay=[name])
        assert decayed["params"] == [] and others["params"] == [model["embed"].weight]
