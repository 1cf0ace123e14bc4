"""The auto-tuned strength of the unknown-aware loss (the op itself is tested in test_unknown_aware_loss.py)."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import uasparse_kernels as ua


def epoch_batches(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randn(9, 5, generator=generator).requires_grad_(), torch.randint(4, (9,), generator=generator)


def threshold_of(logits, target):
    p = logits.softmax(1)
    h = -p[torch.arange(len(target)), target].log()
    return ((1 - p[:, 4]) * h).mean()


def test_alpha_follows_the_schedule():
    loss_fn = ua.UnknownAwareLoss(4, warmup_epochs=2, total_epochs=6, alpha_final=1.5, rho=10.0)
    average, start, alphas = None, None, []
    for epoch in range(6):
        if epoch == 2:
            start = average / 10
        expected = 0.0 if epoch < 2 else start + (1.5 - start) * (epoch - 2) / 3
        assert loss_fn.alpha.item() == pytest.approx(float(expected), rel=1e-5)
        alphas.append(loss_fn.alpha.item())
        for logits, target in epoch_batches(3, epoch):
            loss = loss_fn(logits, target)
            plain = ua.ops.unknown_aware_loss(logits, target, float(expected))[0]
            torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
            if epoch < 2:
                torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
            value = threshold_of(logits.detach(), target)
            average = value if average is None else 0.05 * value + 0.95 * average
            torch.testing.assert_close(loss_fn.average, average)
        loss_fn.step_epoch()
    assert alphas[:2] == [0, 0]
    assert 0 < alphas[2] < alphas[3] < alphas[4] < alphas[5]
    assert alphas[5] == pytest.approx(1.5)


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode", "detached", "not finite"])
def test_what_is_no_training_step_changes_nothing(how):
    loss_fn = ua.UnknownAwareLoss(4, warmup_epochs=1, total_epochs=3)
    loss_fn(*next(epoch_batches(1, 0)))
    before = copy.deepcopy(loss_fn.state_dict())
    logits, target = next(epoch_batches(1, 1))
    if how == "eval":
        loss_fn.eval()(logits, target)
    elif how == "detached":
        loss_fn(logits.detach(), target)
    elif how == "not finite":
        loss_fn(torch.full_like(logits, -torch.inf).requires_grad_(), target)
    else:
        with getattr(torch, how)():
            loss_fn(logits, target)
    assert all(torch.equal(v, loss_fn.state_dict()[k]) for k, v in before.items() if isinstance(v, torch.Tensor))


def test_state_dict_continues():
    def run(loss_fn, epochs):
        for epoch in epochs:
            for logits, target in epoch_batches(2, epoch):
                loss_fn(logits, target)
            loss_fn.step_epoch()
        return loss_fn

    whole = run(ua.UnknownAwareLoss(4, warmup_epochs=2, total_epochs=5), range(4))
    part = run(ua.UnknownAwareLoss(4, warmup_epochs=2, total_epochs=5), range(3))
    resumed = ua.UnknownAwareLoss(4, warmup_epochs=2, total_epochs=5)
    resumed.load_state_dict(part.state_dict())
    run(resumed, range(3, 4))
    assert resumed.epoch == whole.epoch == 4
    for name in ("average", "alpha", "alpha_start"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ua.UnknownAwareLoss(0, warmup_epochs=1, total_epochs=2), "num_classes"),
        (lambda: ua.UnknownAwareLoss(4, warmup_epochs=0, total_epochs=2), "warmup_epochs"),
        (lambda: ua.UnknownAwareLoss(4, warmup_epochs=2, total_epochs=2), "warmup_epochs"),
        (lambda: ua.UnknownAwareLoss(4, warmup_epochs=1, total_epochs=2, rho=0), "rho"),
        (lambda: ua.UnknownAwareLoss(4, warmup_epochs=1, total_epochs=2, reduction="max"), "reduction"),
        (
            lambda: ua.UnknownAwareLoss(4, warmup_epochs=1, total_epochs=2)(
                torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
            ),
            r"\[N, 5\].*num_classes \+ 1 outputs",
        ),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("schedule", [{"total_steps": 20, "warmup_steps": 2}, {"warmup_epochs": 1, "total_epochs": 3}])
def test_a_checkpoint_calls_it_twice_for_one_step(schedule, reentrant):
    plain, repeated = (ua.UnknownAwareLoss(4, **schedule) for _ in range(2))
    for logits, target in epoch_batches(6, 0):
        mine = logits.detach().clone().requires_grad_()
        plain(logits, target).backward()
        checkpoint(repeated, mine, target, use_reentrant=reentrant).backward()
        torch.testing.assert_close(mine.grad, logits.grad)
    assert torch.equal(plain.average, repeated.average) and torch.equal(plain.alpha, repeated.alpha)
    if "total_steps" in schedule:
        assert int(repeated.steps) == 6


@pytest.mark.parametrize("options", [{"rho": float("nan")}, {"alpha_final": float("inf")}, {"weight": [1.0] * 5}])
def test_options_that_are_no_numbers_or_tensors_are_refused(options):
    with pytest.raises(ValueError, match="Expected a"):
        ua.UnknownAwareLoss(4, **options)
