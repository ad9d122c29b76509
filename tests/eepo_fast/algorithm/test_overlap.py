"""Grading and the reference's scores beside sampling: what they find is what they would have found after it."""

import threading
import time
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from eepo_fast.algorithm.overlap import Ahead, Background, GradedAhead, ScoredAhead, set_ref_logprobs
from eepo_fast.distributed import World
from eepo_fast.types import Grade, Interrupted, UserError

OPEN = {"alpha": 9.0}


@pytest.fixture
def beside_grader(coin_grader):
    class Beside(coin_grader):
        """Says where and when it is called, and what it was given."""

        beside_sampling = True

        def __init__(self):
            super().__init__()
            self.calls = []

        def grade(self, problems, completions, *, seconds):
            self.calls.append((threading.current_thread() is threading.main_thread(), list(completions), seconds))
            return super().grade(problems, completions)

    return Beside


LATE = {"rollout": {"max_new_tokens": 40, "group_size": 8, "quorum": 0.25}}


@pytest.mark.parametrize("changes", [{"eepo": OPEN}, {"eepo": {"enabled": False}}, {"eepo": OPEN, **LATE}])
def test_grades_are_those_of_whole_completions(make_trainer, beside_grader, changes):
    """Of all of them, once each; also of a straggler, whose rest is an engine's answer and not a completion."""
    grader = beside_grader()
    batch, _ = make_trainer(grader=grader, **changes).iteration()
    assert [r.reward for r in batch.rollouts] == [float(len(r.completion) % 2) for r in batch.rollouts]
    graded = [c for _, completions, _ in grader.calls for c in completions]
    assert sorted(graded) == sorted(r.completion for r in batch.rollouts)
    elsewhere = [completions for main, completions, _ in grader.calls if not main]
    assert sum(map(len, elsewhere)) >= len(batch.rollouts) / 2, "most of them while others were sampled"
    assert any(r.num_before for r in batch.rollouts) == ("quorum" in changes.get("rollout", {}))


def test_grading_begins_before_the_stage_ends(make_trainer, beside_grader, iterations):
    trainer = make_trainer(grader=beside_grader(), eepo=OPEN)
    seen, generate = [], trainer.engine.generate

    def generating(*arguments):
        rollouts = generate(*arguments)
        iterations[-1].ahead.graded.background.wait()
        seen.append(len(trainer.grader.calls))
        return rollouts

    trainer.engine.generate = generating
    trainer.iteration()
    assert 0 < seen[0] < seen[1]


def test_chunks_share_the_seconds_of_a_step(make_rollouts, beside_grader):
    grader = beside_grader()
    grade, world = grader.grade, World()

    def slow(*arguments, **options):
        time.sleep(0.05)
        return grade(*arguments, **options)

    grader.grade = slow
    ahead = GradedAhead(grader, lambda r: "x", chunk=2, seconds=0.12)
    rollouts = make_rollouts([3, 3, 3, 3, 3, 3])
    for i, rollout in enumerate(rollouts):
        rollout.sample_index = i
        ahead.take(rollout)
    assert len(ahead.grades(rollouts, world)) == 6
    ahead.background.close()
    seconds = [call[2] for call in grader.calls]
    assert seconds[0] == 0.12 and all(0 <= b <= a - 0.05 or b == 0 for a, b in pairwise(seconds))
    assert seconds[-1] == 0


def test_another_rank_knows_some(make_rollouts, coin_grader):
    """What one rank has graded ahead no other grades again, and all ranks end with the same."""
    rollouts = make_rollouts([3, 3, 3, 3])
    for i, r in enumerate(rollouts):
        r.sample_index, r.completion = i, "x" * i
    known = [{}, {}]
    calls = [[], []]

    class Pair:
        size = 2
        agree, check = World.agree, World.check

        def __init__(self, rank):
            self.rank, self.turn = rank, 0

        def gather(self, value):
            barrier.wait(10)
            known[self.rank] = value
            barrier.wait(10)
            return list(known)

    barrier, found = threading.Barrier(2), [None, None]

    class Counting(coin_grader):
        beside_sampling = True

        def __init__(self, rank):
            super().__init__()
            self.rank = rank

        def grade(self, problems, completions, *, seconds):
            calls[self.rank] += completions
            return [Grade(float(len(c)), "ok", 0.0) for c in completions]

    def rank(number):
        ahead = GradedAhead(Counting(number), lambda r: r.completion, chunk=1, seconds=9.0)
        if number == 1:
            ahead.take(rollouts[2])
        found[number] = [g.reward for g in ahead.grades(rollouts, Pair(number))]
        ahead.background.close()

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found[0] == found[1] == [0.0, 1.0, 2.0, 3.0]
    assert sorted(calls[0] + calls[1]) == ["", "x", "xx", "xxx"] and "xx" in calls[1]


def test_a_reward_that_ends_one_rank_ends_all(make_rollouts, coin_grader):
    """Both raise the same line, and neither waits for the other."""
    rollouts, barrier, found = make_rollouts([3, 3]), threading.Barrier(2), [None, None]
    shown = [None, None]

    class Pair:
        size = 2
        agree, check = World.agree, World.check

        def __init__(self, rank):
            self.rank = rank

        def gather(self, value):
            barrier.wait(10)
            shown[self.rank] = value
            barrier.wait(10)
            return list(shown)

    class Leaving(coin_grader):
        def grade(self, problems, completions, *, seconds=None):
            if threading.current_thread().name == "1":
                raise UserError("it ends the process")
            return super().grade(problems, completions)

    def rank(number):
        ahead = GradedAhead(Leaving(), lambda r: r.completion, chunk=9, seconds=9.0)
        try:
            ahead.grades(rollouts, Pair(number))
        except UserError as error:
            found[number] = (str(error), error.shared)
        ahead.background.close()

    threads = [threading.Thread(target=rank, args=(i,), name=str(i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [("it ends the process", True)] * 2


def test_an_error_on_the_graders_thread_ends_the_iteration(make_trainer, beside_grader):
    class Failing(beside_grader):
        def grade(self, problems, completions, *, seconds):
            if threading.current_thread() is not threading.main_thread():
                raise ValueError("its worker cannot start")
            return super().grade(problems, completions, seconds=seconds)

    trainer = make_trainer(grader=Failing(), eepo=OPEN)
    with pytest.raises(ValueError, match="cannot start"):
        trainer.iteration()


def test_what_is_sampled_again_is_graded_again(make_trainer, beside_grader):
    """The guard's first stage 2 does not count: neither its answers, nor the seconds that they took."""
    grader = beside_grader()
    far = {"learning_rate": 2.0, "max_step": 1e30, "max_kl": 1e-9}
    trainer = make_trainer(grader=grader, eepo={**OPEN, **far}, **LATE)
    batch, row = trainer.iteration()
    assert row["unlearn/resampled"] == 1
    assert [r.reward for r in batch.rollouts] == [float(len(r.completion) % 2) for r in batch.rollouts]
    assert sum(seconds == grader.calls[0][2] for _, _, seconds in grader.calls) == 2


def test_a_ranks_chunks_are_a_part_of_its_share(test_config, coin_grader):
    config = test_config(train={"prompts_per_iteration": 16, "prompts_per_update": 16}, rollout={"group_size": 8})
    for size, chunk in ((1, 16), (8, 2), (64, 1)):
        assert Ahead(config, coin_grader(), str, None, World(size=size)).graded.chunk == chunk


def test_one_rank_of_an_engine_grades_its_completions(test_config, beside_grader, make_rollouts):
    together = {"engine": "vllm", "tensor_parallel": 2, "group_size": 4}
    config = test_config(train={"engine": "deepspeed"}, rollout=together)
    called = []
    for rank in range(4):
        grader = beside_grader()
        ahead = Ahead(config, grader, lambda r: "x", None, World(rank=rank, size=4))
        for i, rollout in enumerate(make_rollouts([3] * ahead.graded.chunk)):
            rollout.sample_index = i
            ahead.take(rollout)
        ahead.graded.background.wait()
        ahead.close()
        called.append(len(grader.calls))
    assert called == [1, 0, 1, 0]


def test_an_abandoned_iteration_leaves_no_thread(make_trainer, beside_grader, iterations):
    trainer = make_trainer(grader=beside_grader(), eepo=OPEN)

    def leave():
        raise Interrupted

    trainer.at_safe_point = leave
    with pytest.raises(Interrupted):
        trainer.iteration()
    assert not any(thread.is_alive() for thread in iterations[0].ahead.graded.background.pool._threads)


def num_scored(rollouts):
    return sum(r.ref_logprobs is not None for r in rollouts)


def test_reference_scores_beside_sampling(make_policy, make_rollouts):
    """The same as after it, some only at the end."""
    policy = make_policy(micro_batch_tokens=40)
    rollouts = make_rollouts([9, 12, 7, 15, 8])
    expected = policy.score(rollouts).logprobs
    background = Background("score", threaded=True)
    ahead = ScoredAhead(policy, background)
    for r in rollouts[:4]:
        ahead.take(r)
    background.wait()
    assert 0 < num_scored(rollouts) < len(rollouts)
    set_ref_logprobs(policy, rollouts)
    background.close()
    for r, values in zip(rollouts, expected, strict=True):
        assert r.ref_logprobs == pytest.approx(values, abs=1e-5)


def test_an_iteration_scores_with_the_reference_beside_sampling(make_trainer, iterations, monkeypatch):
    rows = []
    for threaded in (False, True):
        made = lambda name, threaded, _t=threaded, **options: Background(name, threaded=_t)  # noqa: E731
        monkeypatch.setattr("eepo_fast.algorithm.overlap.Background", made)
        trainer = make_trainer(reference=True, eepo=OPEN, grpo={"kl_coef": 0.1}, train={"micro_batch_tokens": 40})
        _, row = trainer.iteration()
        assert (iterations[-1].ahead.scored is not None) == threaded
        rows.append(row)
    assert rows[1]["policy/kl"] == pytest.approx(rows[0]["policy/kl"], rel=1e-4, abs=1e-7)
    assert rows[1]["policy/loss"] == pytest.approx(rows[0]["policy/loss"], rel=1e-4, abs=1e-6)


def test_a_reference_that_runs_out_of_memory_waits(make_policy, make_rollouts):
    policy = make_policy(micro_batch_tokens=40)
    rollouts = make_rollouts([9, 12, 7, 15, 8])
    score, calls = policy.score, []

    def failing(batch):
        calls.append(len(batch))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(batch)

    policy.score = failing
    background = Background("score", threaded=True)
    ahead = ScoredAhead(policy, background)
    for r in rollouts:
        ahead.take(r)
    background.wait()
    assert num_scored(rollouts) == 0
    set_ref_logprobs(policy, rollouts)
    assert num_scored(rollouts) == 5 and ahead.gave_up and calls[1:] == [5]
    background.close()


def test_two_completions_are_never_the_same_one(make_rollouts):
    """Whatever they say: sets and dictionaries of them go by which they are."""
    (one,), (other,) = make_rollouts([5]), make_rollouts([5])
    assert one.token_ids == other.token_ids and one != other and len({one, other, one}) == 2


def test_sampling_that_runs_out_of_memory_begins_again_once(make_trainer, beside_grader, monkeypatch):
    """What ran beside it gives its memory up; grades and metrics are those of an iteration in which it never ran."""
    rows, rewards = [], []
    for fails in (0, 1, 2):
        made = lambda name, threaded, **options: Background(name, threaded=True)  # noqa: E731
        monkeypatch.setattr("eepo_fast.algorithm.overlap.Background", made)
        trainer = make_trainer(grader=beside_grader(), eepo=OPEN, train={"micro_batch_tokens": 40})
        generate, calls = trainer.engine.generate, []

        def failing(requests, sampling, progress, finished, quorum, generate=generate, calls=calls, fails=fails):
            found = generate(requests, sampling, progress, finished, quorum)
            calls.append(len(requests))
            if len(calls) <= fails:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        trainer.engine.generate = failing
        if fails == 2:
            with pytest.raises(torch.OutOfMemoryError):
                trainer.iteration()
            continue
        batch, row = trainer.iteration()
        rows.append(row)
        rewards.append([r.reward for r in batch.rollouts])
        assert row["rollout/out_of_memory"] == fails and len(calls) == 2 + fails
    assert rewards[0] == rewards[1]
    for key in ("unlearn/loss", "unlearn/grad_norm", "policy/loss", "policy/grad_norm"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-4, abs=1e-6)
    assert rows[1]["unlearn/hidden_s"] == 0 < rows[0]["unlearn/hidden_s"]


def test_an_engine_that_nothing_runs_beside_is_not_asked_again(make_trainer):
    trainer = make_trainer(eepo=OPEN)

    def failing(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.engine.generate = failing
    with pytest.raises(torch.OutOfMemoryError):
        trainer.iteration()


@pytest.mark.parametrize("room", [True, False])
def test_a_batch_without_room_beside_the_engine_waits(make_policy, make_rollouts, room):
    policy = make_policy(micro_batch_tokens=40)
    rollouts = make_rollouts([9, 12, 7, 15, 8])
    background, asked = Background("score", threaded=True), []

    def has_room(num_bytes):
        asked.append(num_bytes)
        return room

    background.has_room = has_room
    ahead = ScoredAhead(policy, background)
    for r in rollouts:
        ahead.take(r)
    background.wait()
    assert (num_scored(rollouts) > 0) == room and ahead.put_off == (0 if room else len(asked))
    assert len(asked) > 0 and asked[0] == policy.pass_bytes(gradient=False) > 0
    set_ref_logprobs(policy, rollouts)
    assert num_scored(rollouts) == len(rollouts)
    background.close()


def test_room_is_what_is_free_and_what_is_kept_for_the_stream(monkeypatch):
    """PyTorch keeps memory for a stream. What it keeps for another one is of use to this one where a segment is wholly
    unused: that is given back before memory runs out."""
    background = Background("score", threaded=False)
    assert background.has_room(1e30), "nothing runs beside a CPU's sampling"
    background.stream = SimpleNamespace(cuda_stream=7)
    segments = [
        {"stream": 7, "total_size": 3 << 30, "allocated_size": 1 << 30},
        {"stream": 0, "total_size": 64 << 30, "allocated_size": 1},
        {"stream": 0, "total_size": 8 << 30, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 << 30, 80 << 30))
    assert background.has_room(14 << 30) and not background.has_room((14 << 30) + 1)


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_goes_to_sleep_when_nothing_asks_for_memory(test_config, coin_grader, sleeps):
    """And where it does not sleep nobody waits."""
    config = test_config(rollout={"engine": "vllm", "sleep": sleeps})
    ahead, done, release = Ahead(config, coin_grader(), str, None, World()), [], threading.Event()
    ahead.unlearning, ahead.scoring = (Background(name, threaded=True) for name in ("unlearn", "score"))
    for background in (ahead.unlearning, ahead.scoring):
        background.run(lambda: (release.wait(10), done.append("worked on")))
    threading.Timer(0.2, release.set).start() if sleeps else None
    engine = SimpleNamespace(sleep=lambda: done.append("asleep"))
    ahead.put_to_sleep(engine, nullcontext())
    assert done == (["worked on", "worked on", "asleep"] if sleeps else [])
    release.set()
    ahead.unlearning.close(), ahead.scoring.close(), ahead.close()
