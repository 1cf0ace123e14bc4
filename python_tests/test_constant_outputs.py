"""A network that lost most outputs of a layer says so: when it is made, when updates did it, and in its summary."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import topology


def pattern(rows, outputs, inputs, block=1):
    """One active block in each of the first rows of blocks."""
    mask = torch.zeros(outputs, inputs, dtype=torch.bool)
    mask[: rows * block, :block] = True
    return ua.SparsityPattern.from_mask(mask, block=(block, block))


def model_of(rows, block=1):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 12))
    overrides = {"0": {"pattern": pattern(rows, 8, 8, block), "block": (block, block)}}
    return ua.sparsify(model, 0.2, overrides=overrides)


@pytest.mark.parametrize(("rows", "block", "lost"), [(3, 1, 5), (4, 1, 4), (5, 1, None), (1, 4, 4), (2, 4, None)])
def test_it_is_said_when_the_model_is_made(rows, block, lost, caplog):
    with caplog.at_level(logging.WARNING, logger="uasparse_kernels"):
        model = model_of(rows, block)
    said = f"{lost} of 8 in 0." if lost else None
    assert [said in record.message for record in caplog.records if "no weight left" in record.message] == [True] * (
        said is not None
    )
    summary = ua.summary(model)
    assert summary.constant_outputs == ({"0": (lost, 8)} if lost else {})
    assert ("Outputs without any weight: " in str(summary)) == (lost is not None)


def test_a_lone_layer_and_one_that_becomes_sparser(caplog):
    with caplog.at_level(logging.WARNING, logger="uasparse_kernels"):
        layer = ua.sparsify(nn.Linear(64, 64), 0.9)
        assert not caplog.records
        ua.sparsify(layer, 1 - 8 / 64**2)
    assert "no weight left" in caplog.text and "of 64 in the layer" in caplog.text


def test_many_layers_take_one_line(caplog):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    with caplog.at_level(logging.WARNING, logger="uasparse_kernels"):
        ua.sparsify(model, 1 - 4 / 1024, distribution="uniform")
    (record,) = caplog.records
    assert "and in 2 more layers" in record.message


def test_on_the_meta_device_nothing_is_known():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    ua.sparsify(model, 1 - 4 / 1024, distribution="uniform")
    assert isinstance(ua.summary(model).constant_outputs, dict)


class ToTheFirstRows(topology.Method):
    """Moves all weights to the rows at the top."""

    def update(self, update):
        changes = []
        for layer in update.layers:
            blocks = layer.pattern.blocks()
            wanted = torch.arange(blocks.numel())
            changes.append((blocks[~torch.isin(blocks, wanted)], wanted[~torch.isin(wanted, blocks)]))
        return changes


def test_it_is_said_once_when_updates_did_it(caplog):
    model = ua.sparsify(nn.Linear(16, 16), 0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    dst = ua.DynamicSparsity(model, optimizer, method=ToTheFirstRows(), total_steps=100, delta_t=1)
    with caplog.at_level(logging.WARNING, logger="uasparse_kernels"):
        for _ in range(3):
            model(torch.randn(4, 16)).square().sum().backward()
            dst.step()
            optimizer.step()
            optimizer.zero_grad()
    (record,) = [record for record in caplog.records if "no weight left" in record.message]
    assert "after step 1 " in record.message and "12 of 16 in the layer" in record.message
