"""Defines the keys of the methods: GRPO's slots, EEPO, parameter noise, AEPO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from eepo_fast.config.section import NonNegativeFloat, Positive, PositiveFloat, Section

SHARE_OF_PROMPTS = 4  # aepo.mode: replace draws groups for the first quarter of the prompts


class GrpoConfig(Section):
    clip_low: PositiveFloat = Field(0.2, description="ratios below 1 - clip_low are clipped")
    clip_high: PositiveFloat = Field(0.2, description="ratios above 1 + clip_high are clipped")
    kl_coef: NonNegativeFloat = Field(
        1e-4, description="β, of the KL to the model that training began with; 0: no reference model"
    )
    entropy_coef: NonNegativeFloat = Field(1e-5, description="of the entropy bonus")
    ratio: Literal["sampler", "decoupled", "policy"] = Field(
        "sampler",
        description="what the clipped ratio divides by: the weights that sampled (sampler, the paper's sentence), or "
        "the policy, with an importance weight beside it (decoupled, the default with rollout.carry) or without "
        "(policy)",
    )
    ratio_cap: float = Field(
        2.0, ge=1, allow_inf_nan=False, description="largest importance weight; those above it are cut off there"
    )
    advantage: str = Field(
        "group",
        description="what an answer is worth beside its group: group (GRPO), dr_grpo, rloo, pass_at_k, nsr, "
        "unlikeliness, or file.py:function",
    )
    pass_k: Positive = Field(4, description="pass_at_k: of how many answers one has to be right")
    positive_weight: NonNegativeFloat = Field(0.1, description="nsr: of a right answer; a wrong one weighs -1")
    rank_penalty: float = Field(
        0.25, ge=0, le=1, description="unlikeliness: share of the reward that the likeliest of a group loses, nearly"
    )
    loss: str = Field(
        "ppo", description="of a token: ppo (the clipped ratio), gspo, cispo, kl_cov, or file.py:function"
    )
    cov_share: float = Field(0.002, gt=0, le=1, description="kl_cov: share of an update's tokens that are held back")
    cov_coef: NonNegativeFloat = Field(1.0, description="kl_cov: of the KL that holds them back")
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="what a token weighs: the same in an update, the same share of each answer's mean, or the same "
        "always (1 / rollout.max_new_tokens)",
    )
    mask_truncated: bool = Field(False, description="answers that were cut off give no gradient")
    dynamic_sampling: bool = Field(
        False,
        description="groups whose rewards are all equal are not trained on, and made up for in the next iteration, by "
        "at most as many again",
    )


class EepoConfig(Section):
    enabled: bool = Field(True, description="false: GRPO, the whole group in one stage")
    alpha: PositiveFloat = Field(0.3, description="entropy threshold of the gate, in nats")
    window: Positive = Field(3, description="tokens (gate: token) or iterations (gate: iteration) averaged over")
    learning_rate: NonNegativeFloat = Field(3e-3, description="η of the forget step")
    gate: Literal["token", "iteration", "always"] = Field(
        "token",
        description="what is gated: each token (Eq. 4), the iteration (Algorithm 1), or nothing (an ablation)",
    )
    loss: Literal["complementary", "nll"] = Field("complementary", description="log(1 - p), or -log p (an ablation)")
    prob_floor: NonNegativeFloat = Field(1e-4, description="ε_L; the paper gives no value, ours")
    prob_ceiling_gap: PositiveFloat = Field(1e-4, description="ε_R; the paper gives no value, ours")
    clip_gradient: Literal["literal", "saturate"] = Field(
        "literal", description="literal: no gradient outside the clip of p; saturate: kept above 1 - ε_R"
    )
    reduction: Literal["batch_mean", "prompt_sum"] = Field(
        "batch_mean", description="the mean over the batch, or each prompt's own step"
    )
    num_steps: Positive = Field(1, description="forget steps in a row; more than 1 is an ablation")
    rounding: Literal["stochastic", "nearest"] = Field(
        "stochastic", description="of a forget step into 16-bit weights; nearest loses most of it"
    )
    max_step: PositiveFloat = Field(
        0.02, description="longest forget step, as a share of the weights' norm; a longer one is not taken, and counted"
    )
    max_kl: PositiveFloat = Field(
        1.0,
        description="nats a token: where stage 2 shows that the step moved the model further, it is sampled again from "
        "the policy, and counted",
    )
    direction: Literal["gradient", "random", "temperature"] = Field(
        "gradient",
        description="of the forget step; controls: random, as long as the gradient; temperature: no step, but stage 2 "
        "sampled 1 + learning_rate times as hot",
    )
    step: Literal["fixed", "kl"] = Field(
        "fixed", description="how long the forget step is: learning_rate, or so that stage 2 is target_kl away"
    )
    target_kl: PositiveFloat = Field(
        0.05, description="KL(θ'‖θ), nats a token, that learning_rate is changed for from step to step"
    )
    temperature: PositiveFloat | None = Field(None, description="of stage 2; default rollout.temperature")


class PsnConfig(Section):
    """Parameter-space noise: the whole group is sampled from noisy weights."""

    enabled: bool = Field(False, description="sample the group from the policy's weights plus noise; not with EEPO")
    sigma: PositiveFloat = Field(4e-3, description="standard deviation of the noise")
    target_kl: NonNegativeFloat = Field(
        0.0, description="KL to the policy, nats a token, that sigma is changed for; 0: sigma stays as it is"
    )
    weights: str = Field("mlp", description="noise goes to the weights whose names contain it; empty: to all")
    max_kl: PositiveFloat = Field(
        1.0, description="nats a token: further away is sampled again from the policy, and counted"
    )

    @property
    def step(self) -> EepoConfig:
        """Returns the step that puts the noise on: σ is its η."""
        step = EepoConfig(learning_rate=self.sigma, max_kl=self.max_kl)
        return step.model_copy(update={"step": "kl", "target_kl": self.target_kl}) if self.target_kl else step


class AepoConfig(Section):
    enabled: bool = Field(False, description="add AEPO, to GRPO or to EEPO")
    mode: Literal["term", "replace"] = Field("term", description="an added term, or what the released code does")
    target_entropy: PositiveFloat = Field(0.5, description="nats; below it samples are drawn hot, above it cold")
    temperature_low: PositiveFloat = Field(0.8, description="of the extra samples where entropy is above the target")
    temperature_high: PositiveFloat = Field(1.2, description="of the extra samples where entropy is below the target")
    num_samples: Positive = Field(60, description="extra samples an iteration; replace: at most so many are used")
    coef: NonNegativeFloat = Field(
        0.3,
        description="of the term; of 0.03, 0.1, 0.3, 1 the best on the study's tuning seeds: 63.3, 64.2, 64.3, 64.2",
    )

    def num_extra(self, num_prompts: int, group_size: int) -> int:
        """Returns the completions an iteration beside the batch's own."""
        if not self.enabled:
            return 0
        return self.num_samples if self.mode == "term" else max(1, num_prompts // SHARE_OF_PROMPTS) * group_size


OF_THE_STEP = {
    "alpha", "window", "gate", "loss", "prob_floor", "prob_ceiling_gap", "clip_gradient", "reduction", "num_steps",
    "rounding", "max_step", "temperature",
}  # fmt: skip
