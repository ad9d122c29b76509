"""eepo-fast: GRPO whose rollout forgets, half-way through, what it just said."""
