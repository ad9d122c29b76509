"""eepo-fast trains language models with GRPO whose rollout forgets, half-way through, what it just said."""

import os

# How long one of torch's threads spins while it waits for the others, read when torch is loaded. OpenMP's own default
# spins so long that beside another busy process every parallel region waits for the scheduler: docs/faq.md has figures.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "300"
