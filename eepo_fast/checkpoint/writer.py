"""Saves while training goes on: a thread of each rank writes a copy on the host, which the first makes a checkpoint.

The thread touches files alone. Whether all ranks are done is asked in the main thread, at points where all ranks meet
(`CheckpointWriter.progress`, `settle`), so that a checkpoint appears at the first such point after its last byte.
"""

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eepo_fast.checkpoint.beside import files_beside
from eepo_fast.checkpoint.folder import (
    check_room,
    checkpoint_root,
    commit,
    files,
    folder_of,
    fsync,
    prune,
    sha256,
    temporary_of,
)
from eepo_fast.checkpoint.groups import FILE as GROUPS
from eepo_fast.checkpoint.groups import save_groups
from eepo_fast.checkpoint.state import make_state, random_state
from eepo_fast.config import Config
from eepo_fast.distributed import deal
from eepo_fast.policy.module import Policy
from eepo_fast.rollout.families import persistent_buffers
from eepo_fast.types import Group, TrainerState, UserError

Outcome = dict[str, str] | str | None
"""sha256 of this rank's files once they are on disk; what went wrong; None while it writes. Where the rank is alone,
the checkpoint is made by then."""
INDEX = "model.safetensors.index.json"


class CheckpointWriter:
    """Writes one run's checkpoints, on every rank. At most one is being written at a time."""

    def __init__(self, config: Config, policy: Policy, tokenizer: Any, fingerprint: Mapping[str, str], total: int):
        """Takes what every checkpoint notes. fingerprint: of data, model and tokenizer; total: iterations planned."""
        self.config, self.policy, self.world = config, policy, policy.world
        self.tokenizer, self.fingerprint, self.total = tokenizer, fingerprint, total
        self.saved_step: int | None = None
        self._final: Path | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome = None
        self._beside: dict[str, bytes] | None = None

    def check(self) -> None:
        """Raises a UserError, on the first rank, where a checkpoint could not be written: before any work is done."""
        if not self.world.is_main:
            return
        elements = sum(shape.numel() for shape in self.policy.shapes.values())
        needed = 3 * 4 * elements + sum(map(len, self.beside().values()))
        check_room(self.config.run_dir, needed)

    def beside(self) -> dict[str, bytes]:
        """Returns the files that every checkpoint has beside its weights."""
        if self._beside is None:
            self._beside = files_beside(self.policy.model, self.tokenizer)
        return self._beside

    def start(self, state: TrainerState, evaluation: Mapping[str, float] | None = None) -> None:
        """Begins to save the policy as it is now. All ranks call this."""
        self.finish()
        self._final = final = folder_of(self.config.run_dir, state.step)
        model, optimizer = self._my_part()
        content = make_state(state, self.policy, self.config, self.fingerprint, self.total, evaluation or {})
        generators = self.world.gather(random_state())
        work = (final, model, optimizer, content, generators, state.groups)
        self._outcome = None
        self._thread = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def _my_part(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns this rank's share of the weights and of the optimizer's state: whole tensors, copied to the host."""
        names = list(self.policy.shapes)
        hands = deal([self.policy.shapes[n].numel() for n in names], self.world.size)
        mine = {names[i] for i in hands[self.world.rank]}

        def copied(tensor: Tensor) -> Tensor:  # training goes on in the original
            return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

        model = {name: copied(tensor) for name, tensor in self.policy.masters() if name in mine}
        if self.world.is_main:
            model |= {name: copied(buffer) for name, buffer in persistent_buffers(self.policy.model).items()}
        return model, {k: copied(v) for k, v in self.policy.moments() if k.partition(".")[2] in mine}

    def _write(self, final: Path, *parts: Any) -> None:
        try:
            digests = self._write_files(final, *parts)
            complaint = self._commit(final, digests) if self.world.size == 1 else None
            self._outcome = digests if complaint is None else complaint
        except Exception as error:  # the main thread says it
            self._outcome = f"{getattr(error, 'strerror', None) or str(error) or type(error).__name__}"

    def _write_files(
        self, final: Path, model: dict, optimizer: dict, content: dict, generators: Sequence[Mapping],
        groups: Sequence[Group],
    ) -> dict[str, str]:  # fmt: skip
        temporary, rank, size = temporary_of(final), self.world.rank, self.world.size
        part = "" if size == 1 else f"-{rank + 1:05d}-of-{size:05d}"
        own = temporary / f"rank{rank}"  # this rank's alone, until its files are moved to where they belong
        shutil.rmtree(own, ignore_errors=True)
        (own / "model").mkdir(parents=True)
        written = []
        if model:  # by the names that the policy has; `checkpoint export` gives those of the model's family
            save_file(model, own / "model" / f"model{part}.safetensors", metadata={"format": "pt"})
        if optimizer:
            save_file(optimizer, own / f"optimizer{part}.safetensors")
        if self.world.is_main:
            for name, content_of in self.beside().items():
                (own / "model" / name).parent.mkdir(parents=True, exist_ok=True)
                (own / "model" / name).write_bytes(content_of)
            _write_json(own / "state.json", content)
            _write_json(own / "rng.json", list(generators))
            if groups:
                save_groups(groups, own / GROUPS)
        (temporary / "model").mkdir(exist_ok=True)
        for path in files(own):
            fsync(path)
            target = temporary / path.relative_to(own)
            written.append((target.relative_to(temporary), sha256(path)))
            path.rename(target)
        shutil.rmtree(own)
        return {str(name): digest for name, digest in written}

    @property
    def outcome(self) -> Outcome:
        """Is shown to all ranks, and what they show is given to `settle`."""
        return self._outcome

    def settle(self, everyone: Sequence[Outcome]) -> str | None:
        """Makes the checkpoint of what the ranks have shown, once none of them writes any more. Returns a line that
        says what went wrong, if anything did: then there is none, and the older ones are as they were."""
        if self._final is None or any(p is None for p in everyone):
            return None
        final, step, self._final = self._final, int(self._final.name.removeprefix("step_")), None
        self.close()
        self._outcome = None  # said once, and not at every later meeting
        label = (lambda rank: f"rank {rank}: ") if self.world.size > 1 else (lambda rank: "")
        wrong = [f"{label(rank)}{p}" for rank, p in enumerate(everyone) if isinstance(p, str)]
        complaint = wrong[0] if wrong else None
        if self.world.is_main:
            if complaint is None and self.world.size > 1:
                complaint = self._commit(final, {k: v for p in everyone if isinstance(p, dict) for k, v in p.items()})
            if complaint is not None:
                shutil.rmtree(temporary_of(final), ignore_errors=True)
        if (complaint := self.world.gather(complaint)[0]) is None:
            self.saved_step = step
            return None
        return f"checkpoint {final} could not be written: {complaint}; the older ones are whole"

    def _commit(self, final: Path, digests: dict[str, str]) -> str | None:
        try:
            if self.world.size > 1:
                index = temporary_of(final) / "model" / INDEX
                _write_json(index, _weight_map(sorted(index.parent.glob("*.safetensors"))))
                fsync(index)
                digests[f"model/{INDEX}"] = sha256(index)
            commit(final, digests)
        except OSError as error:
            return error.strerror or str(error)
        with suppress(OSError):  # what cannot be removed now is removed with the next one
            prune(self.config.run_dir, self.config.checkpoint.keep, self.config.checkpoint.best)
        return None

    def finish(self) -> str | None:
        """Waits until the checkpoint that is being written is one. All ranks call this."""
        if self._final is None:
            return None
        self.close()
        return self.settle(self.world.gather(self._outcome))

    def close(self) -> None:
        """Lets the thread finish, whatever has happened."""
        if self._thread is not None:
            self._thread.join()

    def save(self, state: TrainerState, evaluation: Mapping[str, float] | None = None) -> Path:
        """Starts and finishes a checkpoint, and returns its folder; UserError, on all ranks, where that fails."""
        self.start(state, evaluation)
        if (complaint := self.finish()) is not None:
            raise UserError(f"{complaint}; make room under {checkpoint_root(self.config.run_dir)}", shared=True)
        return folder_of(self.config.run_dir, state.step)


def _weight_map(shards: Sequence[Path]) -> dict[str, Any]:
    """Returns transformers' index of sharded weights."""
    places: dict[str, str] = {}
    for path in shards:
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    total = sum(path.stat().st_size for path in shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1 if path.name == "state.json" else None), encoding="utf-8")
