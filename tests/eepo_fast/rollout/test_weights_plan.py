"""The plan recorded from a loader: what it must find, and every way in which it must refuse."""

import pytest
import torch
from eepo_kernels import checksums, sync, tensor_key
from torch import nn

from eepo_fast.rollout.weights import PlanError, check_plan, record_plan

SHAPES = {
    "q": torch.Size([6, 4]),
    "k": torch.Size([2, 4]),
    "down": torch.Size([4, 8]),
    "norm": torch.Size([4]),
    "embed": torch.Size([5, 4]),
}


class Fused(nn.Module):
    """Fuses as vLLM does: q and k in one parameter, one half of the columns of `down`, a padded vocabulary."""

    def __init__(self):
        super().__init__()
        shapes = {"qk": (8, 4), "down": (4, 4), "norm": (4,), "embed": (8, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.seen = []

    def load_weights(self, weights):
        for name, weight in weights:
            self.seen.append(name)
            self.load_one(name, weight)

    def load_one(self, name, weight):
        if name in ("q", "k"):
            self.qk.data[slice(0, 6) if name == "q" else slice(6, 8)].copy_(weight)
        elif name == "down":
            self.down.data.copy_(weight[:, :4])
        elif name == "embed":
            self.embed.data[:5].copy_(weight)
            self.embed.data[5:].fill_(0)
        else:
            self.norm.data.copy_(weight)


class Halves(Fused):
    """Both halves of `down`, side by side in two parameters."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.zeros(4, 4), requires_grad=False)

    def load_one(self, name, weight):
        super().load_one(name, weight)
        if name == "down":
            self.other.data.copy_(weight[:, 4:])


def random_weights():
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def test_the_plan_writes_what_the_loader_writes():
    by_plan, by_loader = Halves(), Halves()
    plan = record_plan(by_plan, SHAPES)
    assert all(not p.any() for p in by_plan.parameters()), "recording writes nothing"
    weights = random_weights()
    sync(plan.views, plan.sources(weights))
    by_loader.load_weights(iter(weights.items()))
    for (name, a), (_, b) in zip(by_plan.named_parameters(), by_loader.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_flat_indices_are_those_of_the_unsharded_source():
    plan = record_plan(Halves(), SHAPES)
    whole = {name: torch.arange(shape.numel(), dtype=torch.float32).view(shape) for name, shape in SHAPES.items()}
    for copy, offset, stride, key in zip(plan.copies, plan.offsets, plan.row_strides, plan.keys, strict=True):
        source = copy.slice_of(whole[copy.name])
        assert key == tensor_key(copy.name)
        rows = source.view(-1, source.shape[-1]) if source.is_contiguous() else source
        expected = offset + stride * torch.arange(len(rows))[:, None] + torch.arange(rows.shape[-1])
        assert torch.equal(rows, expected.float())


def test_a_parameter_that_moved_is_noticed():
    model = Halves()
    plan = record_plan(model, SHAPES)
    assert not plan.is_stale(model)
    model.norm.data = model.norm.data.clone()
    assert plan.is_stale(model)


def broken(**methods):
    return type("Broken", (Halves,), methods)()


def skip_norm(self, name, weight):
    if name != "norm":
        Halves.load_one(self, name, weight)


def scaled(self, name, weight):
    Halves.load_one(self, name, weight * 2 if name == "norm" else weight)


def half_of_norm(self, name, weight):
    if name == "norm":
        self.norm.data[:2].copy_(weight[:2])
        self.norm.data[:2].copy_(weight[2:])
    else:
        Halves.load_one(self, name, weight)


def twice(self, name, weight):
    if name == "norm":
        self.norm.data.copy_(weight)
        self.norm.data[1:3].copy_(weight[1:3])
    else:
        Halves.load_one(self, name, weight)


def one_half_twice(self, name, weight):
    Fused.load_one(self, name, weight)
    if name == "down":
        self.other.data.copy_(weight[:, :4])


def overlapping(self, name, weight):
    Fused.load_one(self, name, weight)
    if name == "down":
        self.other.data.copy_(weight[:, 2:6])


def rebinding(self, name, weight):
    if name == "norm":
        self.norm.data = torch.zeros(4)
    Halves.load_one(self, name, weight)


def transposing(self, name, weight):
    Halves.load_one(self, name, weight.t().reshape(6, 4) if name == "q" else weight)


def transposed_view(self, name, weight):
    if name == "down":
        self.other.data.copy_(weight[:, 4:].t())
        self.down.data.copy_(weight[:, :4])
    else:
        Fused.load_one(self, name, weight)


def unknown_name(self, name, weight):
    if name == "norm":
        raise KeyError(name)
    Halves.load_one(self, name, weight)


def elsewhere(self, name, weight):
    if name == "norm":
        torch.zeros(4).copy_(weight)
    Halves.load_one(self, name, weight)


def broadcast(self, name, weight):
    Halves.load_one(self, name, weight[:1] if name == "norm" else weight)


@pytest.mark.parametrize(
    "loader, words",
    [
        (skip_norm, "writes 0 of 4 elements of norm"),
        (scaled, "something computed, not a slice of a weight, into norm"),
        (half_of_norm, "writes 2 of 4 elements of norm"),
        (twice, "writes part of norm twice"),
        (elsewhere, "no parameter"),
        (rebinding, "no parameter|another tensor in the place of norm"),
        (transposing, "something computed, not a slice of a weight, into qk"),
        (transposed_view, "transposes or reorders down"),
        (unknown_name, "the loader stops with KeyError"),
        (one_half_twice, "takes 16 of 32 elements of down"),
        (overlapping, "takes 24 of 32 elements of down"),
        (broadcast, r"copies shape \(1,\) into \(4,\) of norm"),
    ],
)
def test_a_loader_that_a_plan_cannot_follow_is_refused(loader, words):
    with pytest.raises(PlanError, match=words):
        record_plan(broken(load_one=loader), SHAPES)


def test_what_the_loader_does_beside_copying_is_found():
    """A plan records copies alone; values loaded both ways tell whether that was all."""

    def scales_afterwards(self, name, weight):
        Halves.load_one(self, name, weight)
        if name == "norm":
            self.norm.data.mul_(2)

    for load_one, right in ((Halves.load_one, True), (scales_afterwards, False)):
        model = broken(load_one=load_one)
        plan = record_plan(model, SHAPES)
        if right:
            check_plan(plan, model, SHAPES, torch.float32, sync)
        else:
            with pytest.raises(PlanError, match="not what vLLM's own loader writes"):
                check_plan(plan, model, SHAPES, torch.float32, sync)


def test_unwritten_and_shared_parameters_are_refused():
    model = Halves()
    model.extra = nn.Parameter(torch.zeros(3), requires_grad=False)
    with pytest.raises(PlanError, match="writes 0 of 3 elements of extra"):
        record_plan(model, SHAPES)
    model = Halves()
    model.extra = nn.Parameter(model.norm.data, requires_grad=False)
    with pytest.raises(PlanError, match="share one memory"):
        record_plan(model, SHAPES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_checksums_see_one_bit_and_agree_with_the_source(dtype):
    weights = list(random_weights().values())
    held = [w.to(dtype) for w in weights]
    assert torch.equal(checksums(held), checksums(weights, [dtype] * len(weights)))
    before = checksums(held)
    integers = held[2].view(torch.int32 if dtype == torch.float32 else torch.int16)
    integers[1, 1] ^= 1
    assert (checksums(held) != before).tolist() == [False, False, True, False, False]
    held[0][[0, 1]] = held[0][[1, 0]]
    assert (checksums(held) != before).tolist() == [True, False, True, False, False], "two rows changed places"
