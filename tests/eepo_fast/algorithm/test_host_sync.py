"""On a GPU, reading a number off the device makes the host wait for all that it was given. In the loops over
micro-batches nothing does, with packing: the next is prepared while the device works on this one. (Without packing
transformers looks at the positions of each.)"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eepo_fast.algorithm.forget import GradientPass
from eepo_fast.policy import micro_batches
from eepo_fast.policy.module import prepare_model

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")


class Waits(TorchDispatchMode):
    """Operators whose result's value, or shape, the host needs. The head's own, one operator here, are not seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = isinstance(args[1], list | tuple) if name in ("index", "index_put_") else False
        by_mask = masks and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{"grpo": {"kl_coef": 0.1}}, {"aepo": {"enabled": True}}])
def test_the_update_waits_for_no_micro_batch(make_trainer, changes):
    sections = {"eepo": {"alpha": 9.0}, "train": {"micro_batch_tokens": 30}, **changes}
    trainer = make_trainer(reference="grpo" in changes, **sections)
    prepare_model(trainer.policy.model, packed=True)
    trainer.policy.batching = replace(trainer.policy.batching, packed=True)
    backward, counts = trainer.policy.backward, []
    with Waits() as waits:

        def counted(*arguments):
            counts.append(len(waits.seen))
            return backward(*arguments)

        trainer.policy.backward = counted
        accumulate, spans = trainer._accumulate, []

        def watched(*arguments, **options):
            begin = len(counts)
            result = accumulate(*arguments, **options)
            spans.append((begin, len(counts), len(waits.seen)))
            return result

        trainer._accumulate = watched
        trainer.iteration()
    for begin, end, waited in spans:
        assert end - begin >= 2, "several micro-batches"
        assert waited == counts[begin], waits.seen[counts[begin] : waited]
    assert len(waits.seen) > counts[0], "the counter sees what is read behind the loop"


def test_the_unlearning_pass_waits_for_no_micro_batch(make_policy, make_rollouts, test_config):
    policy = make_policy(micro_batch_tokens=30, packed=True)
    rollouts = make_rollouts([9, 12, 7, 15])
    whole = GradientPass(policy, test_config(eepo={"alpha": 9.0}).eepo, 4, 4)
    batches = policy.micro_batches(rollouts)
    assert len(batches) >= 2
    policy.micro_batches = lambda rollouts: batches
    with Waits() as waits:
        whole.add(rollouts)
        assert not waits.seen
        whole.result(rollouts)
    assert waits.seen


def test_every_tensor_of_a_micro_batch_is_moved_without_waiting(make_rollouts, monkeypatch):
    moved = []

    def recorded(tensor, device):
        moved.append(tensor)
        return tensor

    monkeypatch.setattr(micro_batches, "move", recorded)
    batch = micro_batches.collate(make_rollouts([9, 12]), 0, torch.device("cpu"), True)
    fields = [batch.input_ids, batch.position_ids, batch.boundaries, batch.positions, batch.targets, batch.starts]
    fields += [batch.per_token([1.0, 2.0]), batch.concatenate([[0.0] * 9, [0.0] * 12])]
    known = {t.data_ptr() for t in moved}
    assert all(field.data_ptr() in known for field in fields)


@pytest.mark.gpu
def test_a_micro_batch_goes_to_a_gpu_without_waiting(make_rollouts):
    rollouts, device = make_rollouts([9, 12]), torch.device("cuda")
    micro_batches.collate(rollouts, 0, device, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = micro_batches.collate(rollouts, 0, device, True)
        batch.per_token([1.0, 2.0])
        batch.concatenate([[0.0] * 9, [0.0] * 12])
        with pytest.raises(RuntimeError):
            batch.targets.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
