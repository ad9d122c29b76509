"""Keeps checkpoints: the policy as a Hugging Face folder, its optimizer, and all that a run needs to go on exactly.

    step_000012/model/…                config.json, tokenizer, model.safetensors (several ranks: one shard each, and an
                                       index): loads like any model folder
    step_000012/optimizer*.safetensors AdamW's moments by weight name
    step_000012/rng.json               states of the random generators of each rank
    step_000012/state.json             step, policy_version, entropy window, config, fingerprints, schedule
    step_000012/manifest.json          sha256 of every other file

Each rank writes its part into a temporary folder, while training goes on; once all of it is on disk, the manifest is
written and the folder renamed, so that a folder with the final name is whole. Only the policy's weights are ever saved;
the engine's, which may be forgetful, never.
"""

from eepo_fast.checkpoint.folder import clean, newest_valid, read_state, remove_newer, verify
from eepo_fast.checkpoint.state import changed_keys, load_checkpoint
from eepo_fast.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointWriter", "changed_keys", "clean", "load_checkpoint", "newest_valid", "read_state"]
__all__ += ["remove_newer", "verify"]
