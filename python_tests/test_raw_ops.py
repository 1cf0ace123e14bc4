"""The raw ops (``torch.ops.uasparse``) with what Python can hand them: an exception, or the right result; no crash."""

import fuzz_ops
import pytest
import torch

from uasparse_kernels import SparsityPattern, _library
from uasparse_kernels.ops._common import pattern_tensors

pytestmark = pytest.mark.skipif(_library.compiled is None, reason="needs the compiled kernels")

OPS = torch.ops.uasparse
NAMES = ("crow", "col", "ccol", "row", "perm")
HUGE = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]


def pattern(shape=(24, 20), block=(1, 1), density=0.3, seed=0):
    made = SparsityPattern.random(shape, density, block=block, generator=torch.Generator().manual_seed(seed))
    return dict(zip(NAMES, (t.clone() for t in pattern_tensors(made)), strict=True))


def calls(shape=(24, 20), block=(1, 1)):
    """Of each op that takes a pattern: a call of it, and the names of the tensors that it reads."""
    values = (24 * 20 * 3) // 10
    x, dy, weight = torch.randn(30, 20), torch.randn(30, 24), torch.randn(values)
    image, grad = torch.randn(2, 20, 5, 5), torch.randn(2, 24, 5, 5)
    conv = ([24, 20, 1, 1], [1, 1], [1, 1], [0, 0], [1, 1], 1)
    masks = [True, True, True]
    nothing = torch.empty(0, dtype=torch.int64)
    by_rows, all_five = ("crow", "col"), NAMES
    return {
        "pack": (lambda p: OPS.pack(torch.randn(shape), p["crow"], p["col"], [1, 1]), by_rows),
        "unpack": (lambda p: OPS.unpack(weight, p["crow"], p["col"], shape, [1, 1]), by_rows),
        "keep_active_": (lambda p: OPS.keep_active_(torch.randn(shape), p["crow"], p["col"], [1, 1]), by_rows),
        "exclude_kept_": (lambda p: OPS.exclude_kept_(torch.randn(480), 0, p["crow"], p["col"], nothing, 20), by_rows),
        "masked_linear": (lambda p: OPS.masked_linear(x, weight, None, *p.values(), shape, [1, 1]), by_rows),
        "masked_linear, one row": (
            lambda p: OPS.masked_linear(x[0], weight, None, *p.values(), shape, [1, 1]),
            by_rows,
        ),
        "masked_linear_backward": (
            lambda p: OPS.masked_linear_backward(dy, x, weight, *p.values(), shape, [1, 1], masks),
            all_five,
        ),
        "masked_conv2d": (lambda p: OPS.masked_conv2d(image, weight, None, *p.values(), *conv), by_rows),
        "masked_conv2d_backward": (
            lambda p: OPS.masked_conv2d_backward(grad, image, weight, *p.values(), *conv, masks),
            by_rows,
        ),
        "prune_grow_": (
            lambda p: OPS.prune_grow_(weight, [], *p.values(), nothing, nothing, shape, [1, 1]),
            by_rows,
        ),
    }


DAMAGE = {
    "negative": lambda t: t.__setitem__(len(t) // 2, -1),
    "far": lambda t: t.__setitem__(len(t) // 2, 2**30),
    "first": lambda t: t.__setitem__(0, 3 if t[0] != 3 else 4),
    "last": lambda t: t.__setitem__(-1, 2**20),
    "reversed": lambda t: t.copy_(t.flip(0)),
    "all equal": lambda t: t.fill_(1),
    "noise": lambda t: t.random_(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("op", calls())
def test_damaged_contents_are_refused(op, damage):
    """At the first call and after a right one; and a tensor that is mended serves again."""
    call, read = calls()[op]
    for name in read:
        for before in (False, True):
            tensors = pattern()
            if before:
                call(tensors)
            good = tensors[name].clone()
            DAMAGE[damage](tensors[name])
            if torch.equal(good, tensors[name]):
                continue
            with pytest.raises(ValueError, match="Expected"):
                call(tensors)
            tensors[name].copy_(good)
            call(tensors)


@pytest.mark.parametrize("name", ["ccol", "row", "perm"])
def test_an_order_by_columns_of_another_pattern_is_refused(name):
    tensors, other = pattern(), pattern(seed=1)
    tensors[name] = other[name]
    with pytest.raises(ValueError, match="the order by columns of the blocks"):
        calls()["masked_linear_backward"][0](tensors)


def test_two_columns_exchanged_are_refused():
    """Each tensor alone is plausible then."""
    tensors = pattern()
    i = next(i for i in range(len(tensors["perm"]) - 1) if tensors["row"][i] != tensors["row"][i + 1])
    tensors["perm"][[i, i + 1]] = tensors["perm"][[i + 1, i]]
    with pytest.raises(ValueError, match="the order by columns of the blocks"):
        calls()["masked_linear_backward"][0](tensors)


@pytest.mark.parametrize("damaged", [False, True])
def test_columns_of_16_bits_are_checked(damaged):
    tensors = pattern()
    tensors["col"] = tensors["col"].to(torch.int16)
    call = calls()["masked_linear, one row"][0]
    call(tensors)
    if damaged:
        tensors["col"][5] = -1
        with pytest.raises(ValueError, match="columns of each row"):
            call(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_replaced_past_the_version_is_noticed(name):
    """A whole pattern written by numpy or `.data`: the version stays, the entries that are compared do not."""
    call = calls()["masked_linear_backward"][0]
    tensors, other = pattern((24, 20)), pattern((24, 20), seed=3)
    call(tensors)
    tensors[name].numpy()[:] = other[name].numpy()
    with pytest.raises(ValueError, match="Expected"):
        call(tensors)
    tensors = pattern((24, 20))
    call(tensors)
    tensors[name].data = other[name]
    with pytest.raises(ValueError, match="Expected"):
        call(tensors)


def test_a_tensor_at_a_reused_address_is_another_one():
    call = calls()["masked_linear"][0]
    for _ in range(100):
        tensors = pattern()
        call(tensors)
        bad = {**tensors, "col": tensors["col"].clone()}
        bad["col"][-1] = 20
        del tensors["col"]
        with pytest.raises(ValueError, match="columns of each row"):
            call(bad)


def test_inference_tensors_are_checked_each_time():
    call = calls()["masked_linear_backward"][0]
    with torch.inference_mode():
        tensors = pattern()
        assert tensors["col"].is_inference()
        call(tensors)
        tensors["row"].flip(0)
        tensors["col"][-1] += 20
        with pytest.raises(ValueError, match="columns of each row"):
            call(tensors)


@pytest.mark.parametrize("op", calls())
def test_a_freed_storage_is_an_error(op):
    call, _ = calls()[op]
    for name in NAMES if op not in ("pack", "unpack", "keep_active_", "exclude_kept_") else NAMES[:2]:
        for size in (0, 2):
            tensors = pattern()
            tensors[name].untyped_storage().resize_(size)
            with pytest.raises(ValueError, match=f"Expected {name} .* it was freed or cut"):
                call(tensors)


def freed(*sizes, dtype=torch.float32):
    tensor = torch.ones(sizes, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "call",
    {
        "pack": lambda p: OPS.pack(freed(24, 20), p["crow"], p["col"], [1, 1]),
        "masked_linear input": lambda p: OPS.masked_linear(
            freed(3, 20), torch.ones(144), None, *p.values(), [24, 20], [1, 1]
        ),
        "masked_linear weight": lambda p: OPS.masked_linear(
            torch.ones(3, 20), freed(144), None, *p.values(), [24, 20], [1, 1]
        ),
        "masked_linear bias": lambda p: OPS.masked_linear(
            torch.ones(3, 20), torch.ones(144), freed(24), *p.values(), [24, 20], [1, 1]
        ),
        "topk_indices": lambda p: OPS.topk_indices(freed(9), 3, True),
        "indices_above": lambda p: OPS.indices_above(freed(9), 0.0),
        "batch_norm": lambda p: OPS.batch_norm(freed(4, 3), None, None, 1e-5),
        "loss": lambda p: OPS.unknown_aware_loss(
            freed(4, 3), torch.zeros(4, dtype=torch.int64), torch.tensor(0.0), 1.0, 1
        ),
        "loss target": lambda p: OPS.unknown_aware_loss(
            torch.ones(4, 3), freed(4, dtype=torch.int64), torch.tensor(0.0), 1.0, 1
        ),
    }.items(),
    ids=lambda item: item[0],
)
def test_freed_values_are_an_error(call):
    with pytest.raises(ValueError, match="it was freed or cut"):
        call[1](pattern())


@pytest.mark.parametrize("block", [[0, 0], [0, 1], [1, 2], [-1, -1], [7, 1], [5, 5], [1], [], [1, 1, 1], [2**62, 1]])
@pytest.mark.parametrize("op", ["pack", "unpack", "keep_active_", "masked_linear", "masked_conv2d", "prune_grow_"])
def test_a_wrong_block_is_an_error(op, block):
    p, empty = pattern(), torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="Expected"):
        match op:
            case "pack" | "keep_active_":
                getattr(OPS, op)(torch.randn(24, 20), p["crow"], p["col"], block)
            case "unpack":
                OPS.unpack(torch.randn(144), p["crow"], p["col"], [24, 20], block)
            case "masked_linear":
                OPS.masked_linear(torch.randn(2, 20), torch.randn(144), None, *p.values(), [24, 20], block)
            case "masked_conv2d":
                x, rest = torch.randn(1, 20, 3, 3), ([1, 1], [0, 0], [1, 1], 1)
                OPS.masked_conv2d(x, torch.randn(144), None, *p.values(), [24, 20, 1, 1], block, *rest)
            case _:
                OPS.prune_grow_(torch.randn(144), [], *p.values(), empty, empty, [24, 20], block)


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [24],
        [24, 20, 1],
        [0, 20],
        [24, -20],
        [24, 2**31],
        [2**62, 2**62],
        [2**40, 2**40, 1, 1],
        [24, 20, 2**31, 2**31],
    ],
)
def test_a_wrong_shape_is_an_error(shape):
    p, empty = pattern(), torch.empty(0, dtype=torch.int64)
    for call in (
        lambda: OPS.unpack(torch.randn(144), p["crow"], p["col"], shape, [1, 1]),
        lambda: OPS.masked_linear(torch.randn(2, 20), torch.randn(144), None, *p.values(), shape, [1, 1]),
        lambda: OPS.prune_grow_(torch.randn(144), [], *p.values(), empty, empty, shape, [1, 1]),
    ):
        with pytest.raises(ValueError, match=r"xpected|too large"):
            call()


@pytest.mark.parametrize("value", [0, -1, *HUGE])
@pytest.mark.parametrize("argument", ["stride", "padding", "dilation", "groups"])
def test_convolutions_out_of_range_are_errors(argument, value):
    """Some of them as F.conv2d takes them: a kernel of one tap has any dilation, one output any stride."""
    p = pattern()
    numbers = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    numbers[argument] = value if argument == "groups" else [1, value]
    x, shape = torch.randn(1, 20, 4, 4), [24, 20, 1, 1]
    if argument == "padding" and value == 0:
        assert OPS.masked_conv2d(x, torch.randn(144), None, *p.values(), shape, [1, 1], *numbers.values()).shape[2] == 6
        return
    with pytest.raises(ValueError, match="masked_conv2d: expected"):
        OPS.masked_conv2d(x, torch.randn(144), None, *p.values(), shape, [1, 1], *numbers.values())


@pytest.mark.parametrize("first", [-1, 1, *HUGE, -(2**63)])
def test_scores_out_of_the_grid_are_errors(first):
    p, empty = pattern(), torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="exclude_kept_"):
        OPS.exclude_kept_(torch.randn(480), first, p["crow"], p["col"], empty, 20)


@pytest.mark.parametrize("columns", [0, -1, 19, *HUGE[1:]])
def test_a_wrong_number_of_columns_is_an_error(columns):
    p, empty = pattern(), torch.empty(0, dtype=torch.int64)
    p["col"][-1] = 19  # so that 19 columns are too few
    with pytest.raises(ValueError, match=r"xpected|too large"):
        OPS.exclude_kept_(torch.randn(480), 0, p["crow"], p["col"], empty, columns)


@pytest.mark.parametrize("dropped", [[3, 1], [1, 1], [-1], [480]])
def test_dropped_blocks_are_checked(dropped):
    p = pattern()
    with pytest.raises(ValueError, match="Expected dropped blocks to be distinct, ascending"):
        OPS.exclude_kept_(torch.randn(480), 0, p["crow"], p["col"], torch.tensor(dropped), 20)


def test_k_out_of_range_is_an_error():
    for k in (-1, 10, *HUGE):
        with pytest.raises(ValueError, match="Expected k in"):
            OPS.topk_indices(torch.randn(9), k, True)
        with pytest.raises(ValueError, match="Expected k in"):
            OPS.topk_indices_many([torch.randn(9)], [k], True)


@pytest.mark.parametrize("how", ["same", "overlapping", "expanded", "pattern"])
def test_tensors_that_share_memory_are_not_changed(how):
    p = pattern()
    flat = torch.randn(300)
    weight = flat[:144]
    states = {"same": [weight], "overlapping": [flat[100:244]], "expanded": [torch.zeros(1).expand(144)], "pattern": []}
    if how == "pattern":
        p["perm"] = p["row"]
    active = SparsityPattern((24, 20), p["crow"], p["col"]).blocks()
    before = [t.clone() for t in (flat, *p.values())]
    with pytest.raises(ValueError, match=r"share no memory|places of their own|contiguous"):
        OPS.prune_grow_(weight, states[how], *p.values(), active[:2], active[:2], [24, 20], [1, 1])
    assert all(torch.equal(a, b) for a, b in zip(before, (flat, *p.values()), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64, torch.bool, torch.int32])
@pytest.mark.parametrize(
    "op", ["masked_linear", "masked_linear_backward", "masked_conv2d", "topk_indices", "batch_norm"]
)
def test_dtypes_that_are_not_served_are_errors(op, dtype):
    if op == "topk_indices" and dtype == torch.float16:
        return  # is served
    p = pattern()

    def ones(*sizes):
        return torch.ones(sizes, dtype=dtype)

    with pytest.raises((TypeError, NotImplementedError)):
        match op:
            case "masked_linear":
                OPS.masked_linear(ones(2, 20), ones(144), None, *p.values(), [24, 20], [1, 1])
            case "masked_linear_backward":
                masks = [True] * 3
                OPS.masked_linear_backward(ones(2, 24), ones(2, 20), ones(144), *p.values(), [24, 20], [1, 1], masks)
            case "masked_conv2d":
                rest = ([24, 20, 1, 1], [1, 1], [1, 1], [0, 0], [1, 1], 1)
                OPS.masked_conv2d(ones(1, 20, 3, 3), ones(144), None, *p.values(), *rest)
            case "topk_indices":
                OPS.topk_indices(ones(9), 3, True)
            case _:
                OPS.batch_norm(ones(4, 3), None, None, 1e-5)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_batch_norm_wants_a_positive_eps(eps):
    with pytest.raises(ValueError, match="positive eps"):
        OPS.batch_norm(torch.randn(4, 3), None, None, eps)


def test_random_calls():
    """Ten of each op and kind; `make fuzz` runs millions, under sanitizers."""
    with fuzz_ops.Server(fuzz_ops.instruction_sets()[-1], plain=True) as server:
        outcomes = server.run(0, 10 * len(fuzz_ops.OPS) * len(fuzz_ops.KINDS), "")
    bad = [outcome for outcome in outcomes if outcome["result"] not in ("right", "raised")]
    assert outcomes and not bad, bad[0]


def test_every_op_is_fuzzed():
    """Those with a kernel for CPUs."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("uasparse::")]
    served = {n.split("::")[1] for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU")}
    assert len(served) > 20 and served == fuzz_ops.OPS.keys()


@pytest.mark.parametrize("sizes", [(1, 2, 0, 4), (1, 2, 4, 0), (1, 0, 4, 4), (0, 2, 0, 4)])
def test_max_pool2d_wants_pixels(sizes):
    with pytest.raises(ValueError, match="at least one channel and pixel"):
        OPS.max_pool2d(torch.zeros(sizes), [2, 2], [1, 1], [1, 1])


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sizes", [(2, 0, 0), (2, 0, 3), (2, 3, 0), (0, 0, 3), (0, 3, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_convolutions_of_nothing_but_padding(sizes, kernel, form):
    """The output is the bias; no weight has a gradient."""
    pattern_ = SparsityPattern.random((4, 3, *kernel), 0.5)
    weight, bias = torch.randn(pattern_.packed_shape), torch.randn(4)
    rest = (*pattern_tensors(pattern_), [4, 3, *kernel], [1, 1], [2, 1], [2, 1], [1, 1], 1)
    x = torch.zeros(sizes[0], 3, *sizes[1:]).contiguous(memory_format=form)
    y = OPS.masked_conv2d(x, weight, bias, *rest)
    if sizes[1] * sizes[2] == 0:
        assert torch.equal(y, bias.view(1, 4, 1, 1).expand_as(y))
    dy = torch.randn(y.shape)
    dx, dw, db = OPS.masked_conv2d_backward(dy, x, weight, *rest, [True, True, True])
    assert dx.shape == x.shape and dw.shape == weight.shape and not dw.any()
    torch.testing.assert_close(db, dy.sum((0, 2, 3)))


def test_sizes_beyond_what_is_served_are_errors():
    """Maps that take no memory, being expanded, but whose copies would."""
    p = SparsityPattern.random((1, 2**20, 1, 1), 1e-5)
    x = torch.zeros(1, 1, 1, 1).expand(2**4, 2**20, 2**24, 2**6)
    with pytest.raises(ValueError, match="too large for the sparse kernel"):
        OPS.masked_conv2d(x, torch.ones(p.nnz), None, *pattern_tensors(p), p.shape, [1, 1], [2, 2], [0, 0], [1, 1], 1)
