"""Smoke test of an installed package, run from another folder: the ops are compiled, and a sparse network trains, eager
and in a graph of torch.compile."""

import importlib.metadata

import torch

import uasparse_kernels as ua

info = ua.backend_info()
assert info["compiled"], info
(command,) = importlib.metadata.entry_points(group="console_scripts", name="uasparse")
assert callable(command.load())
files = importlib.metadata.files("uasparse_kernels") or []
assert not any(file.parts[0] == "training" for file in files), "a user's own training.py would be shadowed"
assert "py.typed" in {file.name for file in files}, "type checkers would ignore the annotations"


def train(wrap):
    """The first and the last loss of a training whose topology moves."""
    torch.manual_seed(0)
    model = ua.sparsify(torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)), 0.8)
    function = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    loss_fn = ua.UnknownAwareLoss(3, warmup_epochs=1, total_epochs=2)
    topology = ua.DynamicSparsity(model, optimizer, total_steps=60, delta_t=10)
    x, y = torch.randn(96, 20), torch.arange(96) % 3
    losses = []
    for _ in range(60):
        loss = loss_fn(function(x), y)
        loss.backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    return losses[0], losses[-1]


print(f"uasparse_kernels from {ua.__file__}")
print("loss {:.3f} -> {:.3f}".format(*train(lambda model: model)))
# Compiled graphs hand gradients over to growth, which rests on what torch's compiler does.
print("loss {:.3f} -> {:.3f}, compiled".format(*train(lambda model: torch.compile(model, backend="aot_eager"))))
