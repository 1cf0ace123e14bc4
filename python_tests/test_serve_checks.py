"""Damaged plans of serve_run are refused before anything is written, at the first call and after a right one."""

import json
import random

import pytest
import torch
from torch import nn

import uasparse_kernels as ua
from uasparse_kernels import _library
from uasparse_kernels.inference import files
from uasparse_kernels.inference.builder import AFFINE, CONV, FORMAT, ISAS, LOAD, MADE_FOR, POOL, ROWS, STORE

pytestmark = pytest.mark.skipif(not _library.has_kernel_for("serve_run", "cpu"), reason="needs the compiled part")

# Numbers of a step, its code and its fields (csrc/cpu/serve.cpp).
FIELDS = {LOAD: 21, CONV: 21, ROWS: 18, POOL: 25, AFFINE: 15, STORE: 15}


def prune(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight *= torch.rand(module.weight.shape) < 0.2
    return model.eval()


def call_of(model, x):
    """Arguments of the one call of the interpreter, a right result, and where its steps begin."""
    optimized = ua.optimize_for_inference(prune(model), x)
    plan = optimized._plan([x])
    (call,) = plan.merged
    arena = torch.full((plan.arena,), float("nan"), dtype=x.dtype)
    outputs = [torch.zeros(shape, dtype=x.dtype) for _, shape in call.outputs]
    steps, at = [], 0
    for single in plan.calls:
        steps.append((int(single.program[0]), at))
        assert len(single.program) == FIELDS[steps[-1][0]]
        at += len(single.program)
    arguments = [arena, call.program.clone(), plan.ints.clone(), plan.values.clone(), [x] * len(call.inputs), outputs]
    return arguments, optimized(x), steps


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def captured_images(request):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Hardswish(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Sigmoid(), nn.Conv2d(8, 4, 1)).to(request.param)
    return call_of(model, torch.randn(2, 3, 13, 11, dtype=request.param))


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def captured_rows(request):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 7)).to(request.param)
    return call_of(model, torch.randn(3, 20, dtype=request.param))


def test_plans_of_files_name_their_version_and_machine(captured_rows):
    (arena, program, *rest), wanted, _ = copied(captured_rows)
    isa = ISAS.index(_library.compiled.cpu_isa())
    made = [(FORMAT, own) for own in range(isa + 1)]
    wrong = [
        (FORMAT + 1, isa, "another version"),
        *((FORMAT, i, "for a machine of") for i in range(isa + 1, len(ISAS))),
    ]
    for version, machine, message in wrong:
        with pytest.raises(ValueError, match=message):
            torch.ops.uasparse.serve_run(arena, torch.cat([torch.tensor([MADE_FOR, version, machine]), program]), *rest)
    assert arena.isnan().all()
    for version, machine in made:
        torch.ops.uasparse.serve_run(arena, torch.cat([torch.tensor([MADE_FOR, version, machine]), program]), *rest)
        torch.testing.assert_close(rest[-1][0].view_as(wanted), wanted)


def copied(case):
    """A test's own copy: capturing takes far longer than what the tests do."""
    arguments, right, steps = case
    copies = [t.clone() if isinstance(t, torch.Tensor) else [part.clone() for part in t] for t in arguments]
    return copies, right, steps


@pytest.fixture
def images(captured_images):
    return copied(captured_images)


@pytest.fixture
def rows(captured_rows):
    return copied(captured_rows)


def run(arguments):
    torch.ops.uasparse.serve_run(*arguments)
    return arguments[5][0]


def place(steps, kind, field):
    return next(at for code, at in steps if code == kind) + field


def refused(case, damage):
    """At the first call and after a right one; nothing is written; and right again when mended."""
    arguments, right, _ = case
    for first in (True, False):
        given = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        if not first:
            assert torch.equal(run(given), right)
        before = [t.clone() for t in given[:4]]
        damage(given)
        arena, out = given[0].clone(), given[5][0].zero_()
        with pytest.raises((ValueError, TypeError), match="xpected"):
            run(given)
        assert torch.equal(given[0].nan_to_num(), arena.nan_to_num()) and not out.any()
        for i in range(4):
            given[i] = before[i]
        given[4:] = arguments[4:]
        assert torch.equal(run(given), right)


EXTREMES = (-2, 2**31, 2**62, 2**63 - 1, -(2**63))


def test_every_field_out_of_range_is_refused(images, rows):
    for arguments, right, _ in (images, rows):
        assert torch.equal(run(arguments), right)
        program = arguments[1]
        for i in range(len(program)):
            for value in EXTREMES:
                given = [*arguments]
                given[1] = program.clone()
                given[1][i] = value
                with pytest.raises(ValueError, match="serve_run"):
                    run(given)


@pytest.mark.parametrize(
    "kind, field, value",
    [
        (LOAD, 2, 40_000), (LOAD, 7, 10**6), (LOAD, 8, 5), (LOAD, 11, 0), (LOAD, 12, 64), (LOAD, 13, 3),
        (LOAD, 14, 900), (LOAD, 15, 2000), (LOAD, 17, 10**6), (CONV, 1, 0), (CONV, 2, 0), (CONV, 6, 17),
        (CONV, 9, 3), (CONV, 10, 10**6), (CONV, 11, 10**7), (CONV, 13, 10**9), (CONV, 14, 10**9), (CONV, 15, 10**9),
        (CONV, 16, 10**9), (CONV, 17, 10**9), (CONV, 18, 10**9), (CONV, 19, 10), (POOL, 2, 10**9), (POOL, 11, 99),
        (POOL, 12, 99), (POOL, 17, 0), (POOL, 19, 99), (POOL, 21, 2), (POOL, 22, 5), (AFFINE, 4, 10**6),
        (AFFINE, 8, 8), (AFFINE, 12, 10**9), (STORE, 1, 10**6), (STORE, 6, 99), (STORE, 9, -1), (STORE, 9, 1),
        (STORE, 11, 999), (STORE, 0, 9), (STORE, 0, -1),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(images, kind, field, value):
    where = place(images[2], kind, field)
    refused(images, lambda given: given[1].__setitem__(where, value))


@pytest.mark.parametrize(
    "field, value",
    [(1, 1), (2, 1), (3, 10**6), (5, 9), (6, 19), (6, 70_000), (7, 10**6), (9, 10**7), (12, 10**9), (13, 10**9)],
)
def test_wrong_fields_of_rows_are_refused(rows, field, value):
    where = place(rows[2], ROWS, field)
    refused(rows, lambda given: given[1].__setitem__(where, value))


def test_lists_are_checked(images, rows):
    order, ptr, offsets = (int(images[0][1][place(images[2], CONV, field)]) for field in (13, 14, 15))
    for value in (-1, 64, 2**31 - 1):
        refused(images, lambda given, value=value: given[2].__setitem__(order, value))
    refused(images, lambda given: given[2].__setitem__(order, int(given[2][order + 1])))
    for value in (-(2**31), 2**31 - 1, 10**5, -(10**5)):
        refused(images, lambda given, value=value: given[2].__setitem__(offsets, value))
    for value in (-1, 10**6, 2**31 - 1):
        refused(images, lambda given, value=value: given[2].__setitem__(ptr + 3, value))
    ptr, columns = (int(rows[0][1][place(rows[2], ROWS, field)]) for field in (12, 13))
    for value in (-1, 20, 20 << 16):
        refused(rows, lambda given, value=value: given[2].__setitem__(columns, value))
    for value in (-1, 10**6, 2**31 - 1):
        refused(rows, lambda given, value=value: given[2].__setitem__(ptr + 3, value))


def test_tensors_are_checked(images):
    def set_to(i, change):
        return lambda given: given.__setitem__(i, change(given[i]))

    for i in (1, 2, 3):
        refused(images, set_to(i, lambda t: t[: len(t) // 2]))
        refused(images, set_to(i, lambda t: t.double() if t.dtype != torch.float64 else t.float()))
        refused(images, set_to(i, lambda t: torch.stack([t, t], -1)[:, 0]))
    refused(images, set_to(1, lambda t: torch.cat([t, t[:5]])))
    refused(images, set_to(0, lambda t: t[: len(t) // 2]))
    refused(images, set_to(4, lambda inputs: []))
    refused(images, set_to(4, lambda inputs: [inputs[0][..., :-1].contiguous()]))
    refused(images, set_to(4, lambda inputs: [inputs[0].transpose(2, 3)]))
    refused(images, set_to(4, lambda inputs: [inputs[0].half()]))

    def cut(tensor):
        tensor.untyped_storage().resize_(16)
        return tensor

    for i in (0, 1, 2, 3):
        given = [*images[0]]
        given[i] = cut(given[i].clone())
        with pytest.raises(ValueError, match="freed or cut"):
            run(given)
    given = [*images[0]]
    given[5] = [given[5][0][:, :-1].contiguous()]
    with pytest.raises(ValueError, match="expected output 0"):
        run(given)


def test_written_tensors_share_no_memory(images):
    arguments = images[0]
    arena, program, ints, values, (x,), (y,) = arguments
    ints_and_arena = torch.zeros(len(ints) + len(arena) * arena.itemsize // 4, dtype=torch.int32)
    ints_and_arena[: len(ints)] = ints
    end = len(ints) // 2 * 2
    for given in (
        [ints_and_arena[end - 4 : end - 4 + len(arena) * arena.itemsize // 4].view(arena.dtype), program,
         ints_and_arena[: len(ints)], values, [x], [y]],
        [arena, program, ints, values, [x], [x.view(-1)[: y.numel()].view(y.shape)]],
        [arena, program, ints, values, [x], [arena[: y.numel()].view(y.shape)]],
        [arena, program, ints, values, [x], [y, y]],
    ):  # fmt: skip
        with pytest.raises(ValueError, match="share no memory"):
            run(given)


@pytest.mark.parametrize("size", [(32, 30), (13, 7)])  # of the first, planes would be 4 KiB apart
def test_nothing_is_read_that_was_not_written(size):
    torch.manual_seed(0)
    arguments, right, _ = call_of(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), torch.randn(1, 3, *size))
    assert bool(arguments[0].isnan().all()) and not right.isnan().any()
    assert torch.equal(run(arguments), right)


def test_plans_of_a_model_are_checked_once():
    """Their tensors have a version, also where the model is called under inference mode."""
    x = torch.randn(2, 20)
    with torch.inference_mode():
        model = ua.optimize_for_inference(prune(nn.Sequential(nn.Linear(20, 8))), x)
        model(x)
        plan = model._plan([x])
    tensors = [plan.ints, plan.values, *(call.program for call in plan.merged if call.program is not None)]
    assert len(tensors) > 2 and not any(t.is_inference() for t in tensors)


@pytest.mark.parametrize("seed", range(4))
def test_files_of_damaged_graphs(tmp_path, seed):
    """With the right hash: what comes of it is an exception, or a result."""
    random.seed(seed)
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten()]
    x = torch.randn(2, 3, 12, 12)
    model = ua.optimize_for_inference(prune(nn.Sequential(*layers, nn.Linear(16, 5))), x)
    wanted = model(x)
    model.save(tmp_path / "a")
    tensors, content = files.read(tmp_path / "a")
    refused = 0
    for _ in range(40):
        damaged = json.loads(json.dumps(content))
        places = list(numbers_in(damaged["graph"]["nodes"]))
        holder, key = random.choice(places)
        holder[key] = random.choice([-1, 0, 1, 2, 3, 7, 100, {"ref": "input"}])
        files.write(tmp_path / "b", tensors, damaged)
        try:
            assert isinstance(ua.load_optimized(tmp_path / "b")(x), torch.Tensor)
        except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError):
            refused += 1
    assert refused > 5
    torch.testing.assert_close(ua.load_optimized(tmp_path / "a")(x), wanted)


def numbers_in(value):
    """Where numbers and references are, in nested lists and dictionaries."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, int) or (isinstance(inner, dict) and "ref" in inner):
            yield value, key
        elif isinstance(inner, list | dict):
            yield from numbers_in(inner)
