"""What summary, explain and sparsify's one line of warning say."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

import uasparse_kernels as ua


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.layers = nn.ModuleList([nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 16)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11)
        self.head.weight = self.embed.weight
        self.position = nn.Parameter(torch.zeros(1, 5, 16))

    def forward(self, x):
        return x


def test_the_table_accounts_for_every_parameter():
    model = Model()
    dense = sum(p.numel() for p in model.parameters())
    before = ua.summary(model)
    assert before.sparsity == before.covered == 0 and before.weights + before.others == dense
    assert before.bytes == before.dense_bytes == 4 * dense
    ua.sparsify(model, 0.75, distribution="uniform", exempt=["layers.2", "attention"], block=(4, 4))
    result = ua.summary(model)
    rows = {row.layer: row for row in result.rows}
    assert list(rows) == [
        "position",
        "embed",
        "attention.in_proj_weight",
        "attention.out_proj",
        "layers.0",
        "layers.1",
        "layers.2",
    ]
    sparse = {name: row for name, row in rows.items() if not row.dense_because}
    assert set(sparse) == {"layers.0", "layers.1"}
    for name, row in sparse.items():
        layer = model.get_submodule(name)
        pattern = layer.pattern
        held = [layer.weight, pattern.crow, pattern.col, pattern.ccol, pattern.row, pattern.perm]
        assert row.bytes == sum(t.numel() * t.element_size() for t in held)
        assert row[1:6] == ("SparseLinear", pattern.shape, 0.25, "blocks 4x4", "packed")
    assert (result.weights, result.others) == (before.weights, before.others)
    assert result.covered == 2048 and result.active == result.weights - 1536
    assert result.sparsity == pytest.approx(1536 / result.weights)
    assert result.dense_bytes == 4 * dense
    assert result.bytes == sum(row.bytes for row in result.rows) + 4 * result.others
    reasons = {name: row.dense_because for name, row in rows.items() if row.dense_because}
    for name, text in {
        "embed": "nn.Embedding has no sparse form",
        "attention.in_proj_weight": "exempt",
        "attention.out_proj": "exempt",
        "layers.2": "exempt",
        "position": "a parameter that Model holds itself",
    }.items():
        assert text in reasons[name]
    text = str(result)
    assert max(map(len, text.splitlines())) <= 100
    assert all(part in text for part in (f"{result.sparsity:.2%}", "blocks 4x4", "dense [", "exempt", "25.00%"))
    assert str(ua.summary(copy.deepcopy(model))).count("left dense by") == 1  # a copy's reasons are not known


def test_it_fits_wide_names_and_models_without_values():
    with torch.device("meta"):
        inner = nn.Sequential(nn.Linear(100_000, 20_000), nn.Conv2d(2048, 1024, (3, 3)))
    model = nn.ModuleDict({"a" * 60: nn.ModuleDict({"b" * 60: inner})})
    text = str(ua.summary(model))
    assert max(map(len, text.splitlines())) <= 100 and "8.0 GB" in text and "2,018,874,368" in text
    assert ua.summary(nn.ReLU()).sparsity == 0 and "0 matrices" in str(ua.summary(nn.ReLU()))
    assert ua.summary(nn.Linear(3, 4)).rows[0].layer == "Linear"


def test_densify_forgets_nothing_that_is_true():
    model = ua.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5, exempt=["1"])
    assert ua.summary(model).rows[1].dense_because == "exempt"
    ua.sparsify(model, 0.5)  # now it is covered
    assert [row.dense_because for row in ua.summary(model).rows] == ["", ""]
    assert all(row.dense_because == "sparsify was not called" for row in ua.summary(ua.densify(model)).rows)


@pytest.mark.parametrize("covered", [True, False])
def test_one_line_says_how_little_is_covered(covered, caplog):
    width = 200 if covered else 20
    model = nn.ModuleDict({"rnn": nn.LSTM(16, 16), "fc": nn.Linear(width, width), "mine": nn.Linear(60, 60)})
    ua.sparsify(model, 0.5, exempt=["mine"])  # what the caller leaves out needs no word
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    total = 2 * 64 * 16 + width**2 + 3600
    if covered:
        assert lines == []
    else:
        (line,) = lines
        assert f"covers {1 - 2048 / total:.1%}" in line and "LSTM.weight_ih_l0" in line and "summary(model)" in line


def test_a_table_of_calls_with_totals():
    model = ua.sparsify(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)), 0.9)
    x = torch.randn(2, 3, 8, 8)
    calls = ua.explain(model, x)
    assert isinstance(calls, list) and calls[1].where == "3" and [*calls] == calls
    text = str(calls)
    assert "masked_conv2d" in text and "masked_linear" in text and "2 calls: 2 cpu" in text
    assert all(" ".join(call.reason.split()[:4]) in text for call in calls)
    assert "No call" in str(ua.explain(nn.Linear(3, 3), torch.randn(2, 3)))
    timed = ua.explain(ua.optimize_for_inference(model.eval(), x), x)
    total = sum(row.ms for row in timed)
    assert math.isclose(sum(row.share for row in timed), 1) and f"{total:.3f} ms" in str(timed)
    assert max(map(len, [*text.splitlines(), *str(timed).splitlines()])) <= 100


def test_what_has_no_sparse_form_is_named_with_the_reason():
    class Experts(nn.Module):  # as Mixtral and Qwen-MoE hold theirs
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(4, 16, 8)), nn.Parameter(torch.ones(4, 8, 16))

    tied = nn.Embedding(11, 16)
    head = nn.Linear(16, 11, bias=False)
    head.weight = tied.weight
    parts = {"embed": tied, "head": head, "rnn": nn.LSTM(16, 16), "experts": Experts(), "fc": nn.Linear(16, 16)}
    parts |= {"up": nn.ConvTranspose2d(4, 4, 2), "volume": nn.Conv3d(4, 4, 2), "bag": nn.EmbeddingBag(11, 16)}
    parts |= {"normed": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 2))}
    rows = {row.layer: row for row in ua.summary(ua.sparsify(nn.ModuleDict(parts), 0.5)).rows}
    for name, text in {
        "embed": "nn.Embedding has no sparse form; head is tied to it",
        "rnn.weight_ih_l0": "nn.LSTM has no sparse form",
        "up": "nn.ConvTranspose2d has no sparse form",
        "volume": "nn.Conv3d has no sparse form",
        "bag": "nn.EmbeddingBag has no sparse form",
        "experts.gate_up_proj": "Experts holds stacks of matrices (experts) as single parameters",
        "experts.down_proj": "Experts holds stacks of matrices",
        "normed.parametrizations.weight.original1": "parametrised",
        "fc": "",
    }.items():
        assert text in rows[name].dense_because if text else not rows[name].dense_because


@pytest.mark.parametrize("function", [ua.summary, ua.densify])
def test_what_is_no_model_is_refused(function):
    for odd in (nn.Linear(3, 3).state_dict(), [nn.Linear(3, 3)], None):
        with pytest.raises(TypeError, match=rf"Expected a model \(nn\.Module\), got a {type(odd).__name__}"):
            function(odd)
