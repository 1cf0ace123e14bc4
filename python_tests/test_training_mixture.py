"""The Gaussian-mixture demonstration: with alpha, confidence on points of no class falls."""

import json
from statistics import fmean

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

import torch

from uasparse_kernels.training.study.mixture import REGIONS, class_means, mixture, regions


def test_confidence_falls_with_alpha(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = mixture(tmp_path, alphas=(0.0, 4.0), seeds=(0, 1))
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "mixture.json").read_text()) == results
    assert (tmp_path / "mixture.png").is_file()
    plain, strong = results
    assert [plain["alpha"], strong["alpha"]] == [0.0, 4.0]
    for region in REGIONS:
        assert fmean(strong["confidence"][region]) < fmean(plain["confidence"][region])
        assert fmean(strong["u"][region]) > fmean(plain["u"][region])
    assert fmean(strong["u"]["between"]) > 2 * fmean(strong["u"]["classes"])
    assert abs(fmean(strong["accuracy"]) - fmean(plain["accuracy"])) < 0.05


def test_regions_are_where_they_say():
    points = regions(torch.Generator().manual_seed(0))
    assert set(points) == set(REGIONS)
    assert points["between"].norm(dim=1).max() <= 0.3
    assert points["far"].norm(dim=1).min() >= 4
    assert class_means().mean(0).abs().max() < 1e-6
