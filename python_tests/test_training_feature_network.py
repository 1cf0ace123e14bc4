"""Trained networks in other people's evaluators."""

import pytest

pytest.importorskip("pytorch_ood")

import torch
from pytorch_ood.detector import ASH, EnergyBased, Mahalanobis, ViM
from pytorch_ood.metrics import OODMetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uasparse_kernels as ua
from uasparse_kernels.unknowns import PatchShuffle
from uasparse_kernels.unknowns.errors import UnknownsError
from uasparse_kernels.unknowns.feature_network import FeatureNetwork
from uasparse_kernels.unknowns.scores import Judge


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


class Odd(nn.Module):
    """Two layers that may be the head, the one that is named last defined last."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(16, 4), nn.Linear(16, 4), run

    def forward(self, x):
        return self.run(self, x.flatten(1))


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda m, x: m.a(x), "linear layer, b, to make its logits .* called 0 times"),
        (lambda m, x: m.a(m.b(x).repeat(1, 4)), "linear layer, b, to make its logits"),
        (lambda m, x: m.b(x) + m.b(-x), "called 2 times"),
        (lambda m, x: m.b(x) * 10, "nothing to change them afterwards"),
        (lambda m, x: m.b(x).softmax(1), "leave out what follows it"),
        (lambda m, x: {"logits": m.b(x)}, "a network that gives logits .* got a dict"),
        (lambda m, x: m.b(x)[:, None], r"got \[\d+, 1, 4\]"),
    ],
)
def test_a_network_whose_last_layer_makes_no_logits_is_refused(run, message):
    model, x = Odd(run), torch.randn(9, 1, 4, 4)
    with pytest.raises(UnknownsError, match=message):
        Judge.of(model, lambda x: x, 3, x, torch.arange(9) % 3)
    with pytest.raises(UnknownsError, match=message):
        FeatureNetwork(model, 3).features(x)
    assert not model.b._forward_hooks


def test_a_judge_and_a_shuffle_check_what_they_are_given():
    x, y = torch.randn(9, 1, 4, 4), torch.arange(9) % 3
    model = Odd(lambda m, x: m.b(input=x))
    outputs = Judge.of(model, lambda x: x, 3, x, y).outputs(x)
    assert torch.equal(outputs.features, x.flatten(1)) and torch.equal(outputs.logits, model(x).double())
    for classes, images, labels, message in (
        (5, x, y, "with 5 or 6 outputs, got 4"),
        (3, x[:1], y[:1], "two images or more"),
        (3, x, y[:4], r"a class for each, got images \[9, 1, 4, 4\] and labels \[4\]"),
        (3, x, nn.functional.one_hot(y), r"labels \[9, 3\]"),
        (3, x, y + 1, "classes from 0 to 2, got 1 to 3"),
    ):
        with pytest.raises(UnknownsError, match=message):
            Judge.of(model, lambda x: x, classes, images, labels)
    for images, labels in ((x, nn.functional.one_hot(y).float()), (x.byte(), y), (x[:, 0], y), (x, y[:4])):
        with pytest.raises(UnknownsError, match=r"Expected images \[B, C, H, W\] of floating point and labels \[B\]"):
            PatchShuffle(3)(images, labels)
