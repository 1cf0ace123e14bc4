"""Trained networks in other people's evaluators."""

import pytest

pytest.importorskip("pytorch_ood")

import torch
from pytorch_ood.detector import ASH, EnergyBased, Mahalanobis, ViM
from pytorch_ood.metrics import OODMetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uasparse_kernels as ua
from uasparse_kernels.unknowns.feature_network import FeatureNetwork


@pytest.fixture(params=["dense", "sparse"])
def model(request):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    return net if request.param == "dense" else ua.sparsify(net, 0.5)


def test_logits_features_and_head(model):
    network, x = FeatureNetwork(model, num_classes=3).eval(), torch.randn(7, 1, 4, 4)
    logits, features = network(x, return_feature=True)
    torch.testing.assert_close(logits, model(x)[:, :3])
    torch.testing.assert_close(features, model[:3](x))
    torch.testing.assert_close(network(x), logits)
    torch.testing.assert_close(network.features(x), features)
    torch.testing.assert_close(network.get_fc_layer()(features), logits)
    clipped = network.get_fc_layer()(features.clamp(max=0.2))
    torch.testing.assert_close(network.forward_threshold(x, 0.2), clipped)
    weight, bias = network.get_fc()
    torch.testing.assert_close(features @ torch.from_numpy(weight).T + torch.from_numpy(bias), logits)
    assert not model[3]._forward_pre_hooks
    with pytest.raises(ValueError, match=r"from 1 to the 4 outputs"):
        FeatureNetwork(model, num_classes=5)


def test_detectors_of_pytorch_ood(model):
    network = FeatureNetwork(model, num_classes=3).eval()
    known, labels = torch.randn(90, 1, 4, 4), torch.arange(90) % 3
    train = DataLoader(TensorDataset(known, labels), batch_size=30)
    head = network.get_fc_layer()
    detectors = [
        EnergyBased(network),
        Mahalanobis(network.features).to("cpu").fit(train),
        ViM(network.features, d=6, w=head.weight, b=head.bias).to("cpu").fit(train),
        ASH(lambda x: network.features(x)[:, :, None, None], lambda z: head(z.flatten(1))),
    ]
    with torch.no_grad():
        for detector in detectors:
            metrics = OODMetrics()
            metrics.update(detector(known), labels)
            metrics.update(detector(10 * torch.randn(40, 1, 4, 4)), torch.full((40,), -1))
            assert 0 <= metrics.compute()["AUROC"] <= 1
        torch.testing.assert_close(detectors[0](known), -network(known).logsumexp(1))
