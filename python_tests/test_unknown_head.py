"""The output for "unknown" beside the last layer: what it computes, that it stays dense, that its networks serve."""

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_ood")

import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels.training.config import FitConfig, with_arm
from uasparse_kernels.training.data import load_train_test
from uasparse_kernels.training.errors import TrainingError
from uasparse_kernels.training.recipe import Trainer
from uasparse_kernels.unknowns.errors import UnknownsError
from uasparse_kernels.unknowns.feature_network import FeatureNetwork
from uasparse_kernels.unknowns.head import UnknownHead, give_unknown_head, head_of, num_outputs, unknown_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def random_head(features=7, classes=3):
    head = UnknownHead(features, classes).double()
    for parameter in head.unknown.parameters():
        nn.init.normal_(parameter)
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.5, 2)
    return head


def network(outputs=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, outputs))


def test_unknown_is_linear_in_standardised_features_and_their_squares():
    torch.manual_seed(0)
    head, x = random_head().eval(), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    z = (x - head.norm.running_mean) / (head.norm.running_var + head.norm.eps).sqrt()
    straight, curved = head.unknown.weight[0].split(7)
    expected = (z * straight).sum(1) + (z * z * curved).sum(1) + head.unknown.bias
    torch.testing.assert_close(head(x)[:, 3], expected)
    torch.testing.assert_close(head(x)[:, :3], head.classes(x))
    assert torch.autograd.gradcheck(head, x)
    assert torch.autograd.gradcheck(head.train(), x)


def test_it_learns_what_lies_on_both_sides():
    """Known features about zero, unknown ones on either side: no plane parts them."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200, 2), torch.randn(100, 2) + 6, torch.randn(100, 2) - 6])
    y = torch.cat([torch.randint(2, (200,)), torch.full((200,), 2)])
    head = UnknownHead(2, 2)
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()
    assert ((head(x).argmax(1) == 2) == (y == 2)).float().mean() > 0.97


def test_it_replaces_the_last_layer_and_stays_dense():
    model = give_unknown_head(network())
    assert isinstance(model[4], UnknownHead) and num_outputs(model) == 4 and unknown_layers(model) == ["4.unknown"]
    assert head_of(model) is model[4].classes and head_of(model).out_features == 3
    ua.sparsify(model, 0.9, exempt=unknown_layers(model))
    assert isinstance(model[4].classes, ua.SparseLinear) and type(model[4].unknown) is nn.Linear
    assert model(torch.randn(6, 1, 4, 4)).shape == (6, 4) and num_outputs(model) == 4
    assert num_outputs(network()) == 4 and unknown_layers(network()) == []
    for wrong in (nn.Linear(4, 3), ua.sparsify(network(), 0.5)):
        with pytest.raises(UnknownsError, match=r"around an nn\.Linear"):
            give_unknown_head(wrong)


def test_evaluators_see_the_classes():
    torch.manual_seed(0)
    model, x = give_unknown_head(network()).eval(), torch.randn(5, 1, 4, 4)
    wrapped = FeatureNetwork(model, num_classes=3)
    logits, features = wrapped(x, return_feature=True)
    torch.testing.assert_close(logits, model(x)[:, :3])
    torch.testing.assert_close(wrapped.get_fc_layer()(features), logits)


def test_a_trained_network_with_it_serves_and_is_read_back():
    config = FitConfig(data="digits", epochs=3, warmup_epochs=1, delta_t=3, batch_size=64, stop_fraction=0.6)
    config = with_arm(config, "rigl+relative+vote+hard-shuffle+own-u")
    data = load_train_test("digits", limit_train=320)
    trainer = Trainer(config, data)
    for _ in range(config.epochs):
        trainer.train_epoch()
    model = trainer.result()
    assert model[-1].unknown.weight.count_nonzero() > 0
    x = trainer.normalise(data.test.images[:50])
    served = ua.optimize_for_inference(model, x)
    torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-4)
    again = Trainer(config, data).model
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(x), model(x))


def test_settings_ask_for_an_output_for_unknown():
    with pytest.raises(TrainingError, match="unknown_head own, got loss ce and no synthetic unknowns"):
        with_arm(FitConfig(), "rigl+vote+own-u")
