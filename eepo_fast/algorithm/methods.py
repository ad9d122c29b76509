"""What a config's method is made of: how completions are sampled, and what is added to them."""

from eepo_fast.algorithm.advantages import find_advantage
from eepo_fast.algorithm.aepo import Aepo
from eepo_fast.algorithm.hotter import HotterStage
from eepo_fast.algorithm.iteration import Addition
from eepo_fast.algorithm.noise import NoisyStage
from eepo_fast.algorithm.policy_losses import find_loss
from eepo_fast.algorithm.stages import OneStage, Stages, TwoStage
from eepo_fast.config import Config
from eepo_fast.own import find_method
from eepo_fast.types import TrainerState


class OwnStages:
    """Samples by a function of the user's own: (it) -> completions, as `Stages.sample`."""

    def __init__(self, name: str):
        self.sample = find_method("rollout.sampler", name)


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
