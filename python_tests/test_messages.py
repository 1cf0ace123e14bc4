"""What newcomers meet first: mistakes are refused in words that say what to do, and what is shown can be read."""

import logging
import warnings

import numpy as np
import pages
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import uasparse_kernels as ua

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"sparsity": 90}, ValueError, r"in \[0, 1\), got 90; 90 % is 0.9"),
        ({"sparsity": "0.9"}, TypeError, r"in \[0, 1\), got a str"),
        ({"distribution": "ERK"}, ValueError, r"'erk', 'er', 'uniform', 'global', got 'ERK'"),
        ({"distribution": {"0": 0.5}}, ValueError, "overrides="),
        ({"exempt": "0"}, TypeError, r"pass \['0'\]"),
        ({"block": 4}, ValueError, r"\(r, 1\) or \(b, b\), got 4"),
        ({"block": "4x4"}, ValueError, r"\(b, b\), got '4x4'"),
        ({"block": (4.0, 4.0)}, ValueError, r"\(b, b\), got \(4.0, 4.0\)"),
        ({"structure": "2:4"}, ValueError, "the sparsity 0.5 for structure '2:4', got 0.9"),
        ({"overrides": {"2": {"density": 0.5}}}, TypeError, "2: expected a sparsity, .*, got 'density'"),
        ({"overrides": {"2": 60}}, ValueError, r"2: expected a sparsity in \[0, 1\), got 60"),
        ({"overrides": {"2": {"sparsity": None}}}, TypeError, r"2: expected a sparsity in \[0, 1\), got a NoneType"),
        ({"overrides": {"2": {"block": 4}}}, ValueError, r"2: expected a block .*, got 4"),
        ({"overrides": {"2": torch.ones(8, 32) > 0}}, TypeError, r"SparsityPattern.from_mask\(mask\)"),
        ({"overrides": {"2": {"pattern": torch.ones(8, 32) > 0}}}, TypeError, "from_mask"),
        (
            {"overrides": {"2": {"pattern": ua.SparsityPattern.random((4, 4), 0.5)}}},
            ValueError,
            r"2: expected a pattern of shape \(8, 32\), got \(4, 4\)",
        ),
    ],
)
def test_sparsify_says_what_to_pass_and_changes_nothing(arguments, error, said):
    model = network()
    before = list(model)
    with pytest.raises(error, match=said):
        ua.sparsify(model, **{"sparsity": 0.9, **arguments})
    assert list(model) == before


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        ({"sparsity": "0.9"}, TypeError, r"in \[0, 1\), got a str"),
        ({"sparsity": 1.0}, ValueError, r"in \[0, 1\), got 1.0"),
        ({"sparsity": 0.9, "block": 4}, ValueError, r"\(b, b\), got 4"),
        ({"pattern": torch.ones(8, 16) > 0}, TypeError, r"SparsityPattern.from_mask\(mask\)"),
    ],
)
def test_a_layer_says_what_to_pass(arguments, error, said):
    with pytest.raises(error, match=said):
        ua.SparseLinear(16, 8, **arguments)
    with pytest.raises(error, match=said):
        ua.SparseConv2d(16, 8, 1, **arguments)


@pytest.mark.parametrize(
    "function, others",
    [
        (ua.sparsify, (0.9,)),
        (ua.densify, ()),
        (ua.repack, ()),
        (ua.summary, ()),
        (ua.sparsify_like, ({},)),
        (ua.add_sparse_deltas, (0.1,)),
        (ua.merge_sparse_deltas, ()),
        (ua.add_unknown_output, ("2",)),
        (ua.param_groups, (0.1,)),
        (ua.AveragedModel, ()),
        (lambda model: ua.DynamicSparsity(model, torch.optim.SGD(network().parameters()), total_steps=10), ()),
        (ua.optimize_for_inference, (torch.ones(2, 16),)),
    ],
)
def test_what_is_no_model_or_an_optimised_one_is_refused(function, others):
    with pytest.raises(TypeError, match=r"a model \(nn.Module\), got a OrderedDict"):
        function(network().state_dict(), *others)
    optimized = ua.optimize_for_inference(network().eval(), torch.ones(2, 16))
    for model, where in ((optimized, ": use"), (nn.Sequential(nn.Identity(), optimized), " at '1'")):
        with pytest.raises(ValueError, match=f"weights of its own, got an optimised one{where}"):
            function(model, *others)


def test_a_module_stands_for_its_layers():
    class Block(nn.Sequential):
        pass

    def build():
        block = Block(nn.Linear(16, 16), nn.Linear(16, 16))
        return nn.Sequential(block, nn.TransformerEncoderLayer(16, 2, 32), Block())

    overrides = {"1": 0.75, "1.self_attn": 0.25, "1.self_attn.out_proj": 0.5}
    model = ua.sparsify(build(), 0.5, exempt=["0"], overrides=overrides)
    dense = {row.layer: row.density for row in ua.summary(model).rows}
    assert dense.pop("0.0") == dense.pop("0.1") == 1 and dense.pop("1.linear1") == dense.pop("1.linear2") == 0.25
    assert dense == {"1.self_attn.in_proj": 0.75, "1.self_attn.out_proj": 0.5}
    with pytest.raises(ValueError, match="Cannot override '2'"):
        ua.sparsify(build(), 0.5, overrides={"2": 0.5})
    dense = build()
    ua.add_sparse_deltas(dense, 0.5, exempt=["1"])
    assert [name for name, m in dense.named_modules() if isinstance(m, ua.SparseDelta)] == ["0.0", "0.1"]


def test_reasons_are_those_of_the_layer(caplog):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    ua.sparsify(model, 0.5, distribution="uniform")
    assert "0 cannot be made sparse: it is parametrised\n" in caplog.text
    assert 'prune.remove(layer, "weight")' in caplog.text
    with pytest.raises(ValueError, match="run it once first"):
        ua.sparsify(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8)), 0.5)


def test_gradual_pruning_from_a_dense_model_says_how(caplog):
    model = ua.sparsify(network(), 0.0)
    assert caplog.text.count("the distribution keeps all its weights") == 1 and "include_dense=True" in caplog.text
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="include_dense=True"):
        ua.DynamicSparsity(model, optimizer, method="gmp", total_steps=10, delta_t=2)


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_gradual_pruning_that_would_prune_nothing_warns(method):
    model = ua.sparsify(network(), 0.95, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="final_sparsity of 0.9, got none: nothing will be pruned"):
        ua.DynamicSparsity(model, optimizer, method=method, total_steps=10, delta_t=2)
    for sparsity in (0.5, 0.9):  # what it prunes, and what it has pruned and is resumed
        model = ua.sparsify(network(), sparsity, distribution="uniform")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ua.DynamicSparsity(model, optimizer, method=method, total_steps=10, delta_t=2)


def test_a_topology_shows_itself_and_refuses_another_schedule():
    model = ua.sparsify(network(), 0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=40, delta_t=10)
    assert "RigL" in repr(topology) and "step=0, moving, 2 sparse layers of sparsity 89.97%" in repr(topology)
    state = topology.state_dict()
    other = ua.DynamicSparsity(model, optimizer, total_steps=80, delta_t=10)
    assert "detached" in repr(topology)
    with pytest.raises(ValueError, match=r"total_steps=40.* there, total_steps=80.* here. Resume with the settings"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rigl, .*got 'gmp:0.8'; .*topology.GMP\(final_sparsity=0.8\)"):
        ua.DynamicSparsity(model, optimizer, method="gmp:0.8", total_steps=40, delta_t=10)
    with pytest.raises(TypeError, match=r"topology.RigL\(\), got the class GMP: make one"):
        ua.DynamicSparsity(model, optimizer, method=ua.topology.GMP, total_steps=40, delta_t=10)
    with pytest.raises(TypeError, match=r"Expected a model .*, got a SGD"):
        ua.DynamicSparsity(optimizer, model, total_steps=40, delta_t=10)
    with pytest.raises(TypeError, match=r"got a Sequential; of a model pass model.state_dict\(\)"):
        ua.sparsify_like(network(), model)


class _Reads(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.one, self.how = nn.Linear(8, 8), how


class _ByAnotherName(_Reads):
    def forward(this, x):
        return F.linear(x, this.one.weight)


class _ByAVariable(_Reads):
    def forward(self, x):
        layer, bias = self.one, self.one.bias
        weight = layer.weight
        return F.linear(x, weight, bias)


class _ByIndex(_Reads):
    def forward(self, x):
        return self.helper(self.one(x))

    def helper(self, x):
        return F.linear(x, self.layers[1].weight)


class _InALoop(_Reads):
    def forward(self, x):
        for _, layer in enumerate(self.layers):
            x = F.linear(x, layer.weight)
        return self.one(x)


class _CallsThem(_Reads):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return self.one(x)


@pytest.mark.parametrize(
    "cls, dense",
    [
        (_ByAnotherName, ["one"]),
        (_ByAVariable, ["one"]),
        (_ByIndex, ["layers.1"]),
        (_InALoop, ["layers.0", "layers.1", "layers.2"]),
        (_CallsThem, []),
    ],
)
def test_weights_that_a_forward_reads_in_other_ways_stay_dense(cls, dense):
    model = ua.sparsify(cls(None), 0.5, distribution="uniform")
    assert [row.layer for row in ua.summary(model).rows if row.dense_because] == dense
    model(torch.randn(2, 8)).sum().backward()


def test_explain_of_a_compiled_model_says_as_much():
    model = ua.sparsify(network(), 0.9)
    x = torch.randn(4, 16)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = ua.explain(compiled, x)
    assert [row[1:] for row in rows] == [row[1:] for row in ua.explain(model, x)]


def test_the_first_training_command_of_the_page_can_train(monkeypatch):
    pytest.importorskip("pytorch_ood")
    from uasparse_kernels.training import __main__ as cli
    from uasparse_kernels.training.data import load_train_test
    from uasparse_kernels.training.recipe import Trainer

    made = []
    monkeypatch.setattr(cli, "fit", lambda config, *_, **__: made.append(Trainer(config, load_train_test(config.data))))
    blocks = [
        code for _, found in pages.sections("docs/command-line.md") for language, code in found if language == "sh"
    ]
    (line,) = [line for code in blocks for line in code.splitlines() if " fit " in line]
    monkeypatch.setattr("sys.argv", line.split()[2:])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and len(made) == 1


def test_benchmarks_without_a_suite_measure_nothing(monkeypatch, capsys):
    pytest.importorskip("typer")
    import runpy

    monkeypatch.setattr("sys.argv", ["benchmarks"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("benchmarks", run_name="__main__")
    assert stop.value.code != 0 and "Usage" in "".join(capsys.readouterr())


@pytest.mark.parametrize("given", [None, [1.0, 2.0], np.zeros((2, 4, 8, 8), np.float32)])
def test_what_is_no_tensor_is_called_so(given):
    """As by torch's own layers: TypeError, and not what a layer happens to ask of its input first."""
    layers = [
        ua.nn.SparseLinear(8, 4, sparsity=0.5),
        ua.nn.SparseConv1d(4, 4, 3, sparsity=0.5),
        ua.nn.SparseConv2d(4, 4, 3, sparsity=0.5),
        ua.nn.MaxPool2d(2),
        ua.nn.ReLU(inplace=True),
        ua.nn.ReLU6(inplace=True),
    ]
    for layer in layers:
        with pytest.raises(TypeError, match=f"(?i)input.* be .*tensor.*{type(given).__name__}"):
            layer(given)
    loss_fn = ua.UnknownAwareLoss(3, total_steps=10)
    logits, target = torch.randn(2, 4, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    for name, arguments in (("logits", (given, target)), ("target", (logits, given))):
        with pytest.raises(TypeError, match=f"expected {name} to be a tensor, got {type(given).__name__}"):
            loss_fn(*arguments)
    with pytest.raises(TypeError, match=r"expected a SparsityPattern, got Tensor; .*from_mask"):
        ua.ops.masked_linear(torch.zeros(2, 8), torch.zeros(4, 8), torch.ones(4, 8) > 0)


def test_a_refused_loss_is_no_step():
    loss_fn = ua.UnknownAwareLoss(3, total_steps=10)
    logits, target = torch.randn(2, 4, requires_grad=True), torch.tensor([0, 4])
    with pytest.raises(IndexError):
        loss_fn(logits, target)
    assert loss_fn.steps == 0
    loss_fn(logits, target.clamp(max=3))
    assert loss_fn.steps == 1


def test_a_mask_may_be_numpys():
    mask = torch.rand(8, 16) > 0.5
    assert torch.equal(ua.SparsityPattern.from_mask(mask.numpy()).to_mask(), mask)


def test_the_version_is_where_it_is_looked_for():
    assert ua.__version__ == ua.backend_info()["uasparse_kernels"]
    with pytest.raises(AttributeError, match="no attribute 'sparsity'"):
        _ = ua.sparsity


def test_log_level_is_the_users():
    assert logging.getLogger("uasparse_kernels").level == logging.NOTSET
