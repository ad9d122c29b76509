"""Keys of methods that do not fit each other, each in one line; and overlays that stack with EEPO's."""

from pathlib import Path

import pytest

from eepo_fast.config import load_config
from eepo_fast.types import UserError

ROOT = Path(__file__).parents[3]
DEMO = str(ROOT / "configs/demo.yaml")
STACKS = (
    "dr_grpo",
    "rloo",
    "dapo",
    "gspo",
    "cispo",
    "pass_at_k",
    "nsr",
    "unlikeliness",
    "kl_cov",
    "clip_higher",
    "aepo",
)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grpo.advantage=grup"], r"grpo.advantage: expected one of group, .*; did you mean group\?"),
        (["grpo.loss=gpso"], r"grpo.loss: expected one of ppo, .*; did you mean gspo\?"),
        (["rollout.sampler=mine"], r"rollout.sampler: expected file.py:function, found 'mine'"),
        (["grpo.advantage=pass_at_k", "grpo.pass_k=8"], r"grpo.pass_k: expected below rollout.group_size \(8\)"),
        (["grpo.loss=gspo"], r"grpo.ratio: expected decoupled or policy with grpo.loss=gspo.*; set grpo"),
        (["rollout.sampler=a.py:b"], r"eepo.enabled: expected false with rollout.sampler.*; set eepo.ena"),
        (["reward.overlong_share=0.1", "grpo.advantage=nsr"], r"reward.overlong_share: expected 0 with grpo.adv"),
        (["reward.overlong_penalty=0.1"], r"reward.overlong_penalty: expected reward.overlong_share above 0 with it"),
        (["eepo.temperature=2", "eepo.step=kl"], r"eepo.temperature: expected none with eepo.step=kl, found 2"),
        (["grpo.loss=kl_cov", "grpo.ratio=policy"], r"grpo.loss: expected another than kl_cov with one"),
        (["grpo.pass_k=2"], r"grpo.pass_k: expected grpo.advantage=pass_at_k with it, found group"),
        (["grpo.cov_coef=2"], r"grpo.cov_coef: expected grpo.loss=kl_cov with it, found ppo"),
        (["psn.enabled=true"], r"psn.enabled: expected false with eepo.enabled.*; set eepo.enabled=false"),
        (["psn.sigma=0.1"], r"psn.sigma: expected psn.enabled=true with it, found false"),
        (["psn.enabled=true", "eepo.enabled=false", "train.engine=deepspeed"], r"psn.enabled: .*; use train.engine="),
        (["psn.enabled=true", "eepo.enabled=false", "psn.target_kl=2"], r"psn.target_kl: expected below psn.max_kl"),
        (["psn.enabled=true", "eepo.enabled=false", "psn.sigma=0"], r"psn.sigma: expected greater than 0"),
        (["reward.overlong_share=1"], r"reward.overlong_share: expected less than 1"),
        (["eepo.temperature=0"], r"eepo.temperature: expected greater than 0"),
        (["eepo.temperature=0.001", "rollout.engine=vllm"], r"eepo.temperature: expected at least 0.01"),
        (["eepo.direction=temperature", "eepo.temperature=2"], r"eepo.temperature: expected eepo.direction=gradient"),
        (["grpo.aggregation=mean"], r"grpo.aggregation: expected 'token', 'sequence' or 'constant'"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_one_line(overrides, words):
    with pytest.raises(UserError, match=words) as found:
        load_config([DEMO], overrides)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", STACKS)
def test_an_overlay_stacks_with_eepo(name):
    """EEPO's behind it: what the first one sets is still there, and the second stage is on."""
    overlay, several = str(ROOT / f"configs/methods/{name}.yaml"), ["train.prompts_per_update=16"]
    several += ["grpo.ratio=decoupled"] if name in ("gspo", "kl_cov") else []
    alone = load_config([DEMO, overlay], several)
    both = load_config([DEMO, overlay, str(ROOT / "configs/methods/eepo.yaml")], several)
    assert not alone.eepo.enabled and both.eepo.enabled
    assert (both.grpo, both.reward, both.aepo) == (alone.grpo, alone.reward, alone.aepo)


def test_noise_does_not_stack_with_eepo():
    overlays = [str(ROOT / f"configs/methods/{name}.yaml") for name in ("psn", "eepo")]
    with pytest.raises(UserError, match=r"psn.enabled: expected false with eepo.enabled"):
        load_config([DEMO, *overlays], [])
