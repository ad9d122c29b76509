"""What a config's method is made of: how completions are sampled, and what is added to them."""

from collections.abc import Sequence

from eepo_fast.algorithm.advantages import find_advantage
from eepo_fast.algorithm.aepo import Aepo
from eepo_fast.algorithm.hotter import HotterStage
from eepo_fast.algorithm.in_flight import key_of
from eepo_fast.algorithm.iteration import Addition, Iteration
from eepo_fast.algorithm.noise import NoisyStage
from eepo_fast.algorithm.policy_losses import find_loss
from eepo_fast.algorithm.stages import OneStage, Stages, TwoStage
from eepo_fast.config import Config
from eepo_fast.own import find_guarded
from eepo_fast.types import Rollout, TrainerState, UserError


class OwnStages:
    """Samples by a function of the user's own: (it) -> completions, as `Stages.sample`."""

    def __init__(self, name: str):
        self.function = find_guarded("rollout.sampler", name)

    def sample(self, it: Iteration) -> list[Rollout]:
        """Raises a UserError where the function has not sampled each of the iteration's completions once, to its end
        unless it may be carried on."""
        sampled, size = self.function(it), it.config.rollout.group_size
        wanted = {(*key_of(r), r.sample_index) for r in it.carried}
        wanted |= {(it.seed[1], prompt.id, i) for prompt in it.prompts for i in range(size)}
        known = [r for r in sampled if isinstance(r, Rollout)] if isinstance(sampled, Sequence) else []
        ended = {(*key_of(r), r.sample_index) for r in known if it.config.rollout.carry or not r.preempted}
        if ended != wanted or len(known) != len(wanted):
            raise UserError(
                f"rollout.sampler: expected each of {len(wanted)} completions once, {size} of each prompt and none of "
                f"them preempted, found {len(known)}, of which {len(ended & wanted)} are among them",
                shared=True,
            )
        return known


def check_methods(config: Config) -> None:
    """Raises a UserError where a function of the user's own that the config names is not there."""
    find_advantage(config.grpo.advantage)
    find_loss(config.grpo)
    make_stages(config)


def make_stages(config: Config) -> Stages:
    if config.rollout.sampler:
        return OwnStages(config.rollout.sampler)
    if config.psn.enabled:
        return NoisyStage()
    if not config.eepo.enabled:
        return OneStage()
    return HotterStage() if config.eepo.direction == "temperature" else TwoStage()


def make_additions(config: Config, state: TrainerState) -> list[Addition]:
    """Returns the additions of one iteration, for which `state` is what the last one has left."""
    return [Aepo(config.aepo, state.entropy)] if config.aepo.enabled else []
