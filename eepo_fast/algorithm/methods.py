"""What a config's method is made of: how completions are sampled, and what is added to them."""

from eepo_fast.algorithm.aepo import Aepo
from eepo_fast.algorithm.iteration import Addition
from eepo_fast.algorithm.stages import OneStage, Stages, TwoStage
from eepo_fast.config import Config
from eepo_fast.types import TrainerState


def make_stages(config: Config) -> Stages:
    return TwoStage() if config.eepo.enabled else OneStage()


def make_additions(config: Config, state: TrainerState) -> list[Addition]:
    """Returns the additions of one iteration, for which `state` is what the last one has left."""
    return [Aepo(config.aepo, state.entropy)] if config.aepo.enabled else []
