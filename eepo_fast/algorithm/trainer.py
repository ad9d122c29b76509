"""One iteration, the same for every method: sample, grade, advantages, score, update. How completions are sampled is in
stages.py; what a method adds to them and to the loss, in its own file (methods.py says which).

Deviations from the paper are listed where they are made: losses.py, forget.py, aepo.py. Here: the policy is updated on
mini-batches of `train.prompts_per_update` prompts in sampling order.

Every rank runs this with the same prompts and holds the whole batch; sampling, grading and the model's passes are
shared out inside the calls. One process is a world of one.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from functools import partial

from eepo_fast.algorithm import metrics as M
from eepo_fast.algorithm.advantages import set_advantages
from eepo_fast.algorithm.guards import check_updates
from eepo_fast.algorithm.in_flight import choose, num_missing, open_groups, put_back
from eepo_fast.algorithm.iteration import Iteration, Setup
from eepo_fast.algorithm.losses import PolicyTokens, Term, aggregation_weights, update_loss
from eepo_fast.algorithm.methods import make_additions, make_stages
from eepo_fast.algorithm.policy_losses import find_loss
from eepo_fast.algorithm.ratio import has_finite_logprobs, lacks_prox_logprobs, set_old_logprobs
from eepo_fast.policy.schedule import rate_of
from eepo_fast.rollout.engine import OnProgress
from eepo_fast.types import Rollout, RolloutBatch, WeightsVersion


class Trainer(Setup):
    """Goes through iterations."""

    def iteration(self, progress: OnProgress | None = None) -> tuple[RolloutBatch, dict[str, float]]:
        """Does one iteration; returns its rollouts and its metrics. `state.step` counts it only when all of it is
        done."""
        additions = make_additions(self.config, self.state)
        groups, cursor = open_groups(self.config, self.state, self.prompts, self.total)
        with closing(Iteration(self, groups, additions, progress)) as it:
            put_back(groups, make_stages(self.config).sample(it))
            extra = [r for addition in additions for r in addition.rollouts]
            it.put_to_sleep("ref_logprobs")
            everything = [*(r for group in groups for r in group.rollouts), *extra]
            self._grade(it, [r for r in everything if not (r.preempted or r.status)])
            size = self.config.rollout.group_size
            set_advantages(RolloutBatch.of([g for g in groups if g.is_whole], size), self.config)
            done, trained = choose(self.config, groups)
            batch = RolloutBatch.of(done, size)
            batch.extra = extra
            self.on_graded(batch)
            rows = [r for group in trained for r in group.rollouts]
            for addition in additions:
                rows = addition.choose(it, rows)
            self._score(it, batch, rows)
            it.at_safe_point()
            with it.phase("update"):
                update = self._update(it, rows)
            self.state.step += 1
            self.state.missing = num_missing(self.config, self.state, len(trained))
            self.state.cursor, self.state.groups = cursor, [g for g in groups if g not in done]
            it.remember(update.mean("entropy/policy"))
            return batch, M.iteration_metrics(it, batch, len(trained), update)

    def _grade(self, it: Iteration, rollouts: Sequence[Rollout]) -> None:
        for rollout, grade in zip(rollouts, it.grades(rollouts), strict=True):
            rollout.status = grade.status
            known = grade.status not in ("timeout", "error") and math.isfinite(grade.reward)
            known = known and has_finite_logprobs(rollout)
            rollout.reward = grade.reward if known else None

    def _score(self, it: Iteration, batch: RolloutBatch, rows: Sequence[Rollout]) -> None:
        """Fills the columns that the update reads, and those that the log shows. What the first update is on needs no
        scoring pass: its own forward finds θ's log-probs."""
        grpo, mark = self.config.grpo, find_loss(self.config.grpo).mark
        _, *later = parts = self._mini_batches(rows)
        wanted = [r for part in later for r in part if lacks_prox_logprobs(r, grpo, it.theta)]
        it.set_prox_logprobs("old_logprobs", [r for r in rows if r.prox_logprobs is None] if mark else wanted)
        if mark:
            for part in parts:
                mark(part, aggregation_weights(self.config, part), grpo)
        set_old_logprobs(rows, grpo, it.theta)
        it.set_ref_logprobs(rows)
        if self.config.log.token_details:
            it.set_prox_logprobs("token_details", [r for r in batch.rollouts if r.entropy is None])

    def _mini_batches(self, rows: Sequence[Rollout]) -> list[Sequence[Rollout]]:
        """Returns the completions of each update, whole groups together: as many updates as an iteration has, and as
        even as they go where `grpo.dynamic_sampling` has left some groups out, or made up for others."""
        train, size = self.config.train, self.config.rollout.group_size
        count, groups = train.prompts_per_iteration // train.prompts_per_update, len(rows) // size
        starts = [-(-groups * i // count) * size for i in range(count)]  # an update without any is the last
        return [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]

    def _update(self, it: Iteration, rows: Sequence[Rollout]) -> M.UpdateStats:
        """Updates the policy on mini-batches; loss sums are over a mini-batch's tokens, whatever the micro-batches. One
        on which there is nothing to learn from is left out."""
        stats = M.UpdateStats()
        parts = self._mini_batches(rows)
        for update, part in enumerate(parts):
            terms = [term for addition in it.additions for term in addition.terms(update, len(parts))]
            if not part and not terms:
                continue
            accumulate = partial(self._accumulate, it.theta, part, terms, first=update == 0)
            stats.add(it.within_memory(self.policy, accumulate))
            stats.learning_rate = rate_of(self.policy.scheduler)
            norm, applied = self.policy.step()
            stats.grad_norms.append(norm)
            self.state.bad_updates = 0 if applied else self.state.bad_updates + 1
            check_updates(self.state.bad_updates, self.state.step, norm)
            stats.skipped += not applied
            self.state.policy_version += applied
        stats.add_other_ranks(self.world)
        return stats

    def _accumulate(
        self, theta: WeightsVersion, mini_batch: Sequence[Rollout], terms: Sequence[Term], *, first: bool
    ) -> M.UpdateStats:
        """Adds the gradient of a mini-batch, and of what methods add to it, to what the next step applies."""
        stats = M.UpdateStats()
        weight_of = aggregation_weights(self.config, mini_batch)
        added = [r for term in terms for r in term.rollouts]
        for micro in self.policy.micro_batches([*mini_batch, *added]):
            weights = micro.per_token([weight_of.get(r, 0.0) for r in micro.rollouts])
            tokens = PolicyTokens.of(micro, weights, theta, with_reference=self.reference is not None)
            loss, token_stats = self.policy.backward(micro, update_loss(self.config, tokens, micro, terms))
            stats.add_micro_batch(self.config, micro, tokens, token_stats, loss, first)
        return stats
