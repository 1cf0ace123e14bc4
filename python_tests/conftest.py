"""Shared by all tests: fixed seeds, and random patterns and weights of odd sizes."""

import pytest
import torch

import uasparse_kernels as ua


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def make_pattern():
    def make(shape, density=0.3, block=(1, 1), device="cpu"):
        return ua.SparsityPattern.random(shape, density, block=block, device=device)

    return make
