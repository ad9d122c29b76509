"""Makes, before a run begins, the files that a checkpoint has beside its weights: of config, generation config and
tokenizer. They do not change while it trains, and what transformers refuses to write then stops no weights later.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from eepo_fast.types import UserError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
OF_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
PLAIN = (".json", ".jinja", ".txt", ".model")


def files_beside(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Returns name and content of each file. What cannot be written as it is now is as the model's folder has it;
    UserError where there is no such file either."""
    source = str(getattr(model.config, "name_or_path", "") or "")
    content = _written("config", model.config, source, (CONFIG,))
    if model.generation_config is not None:
        try:
            content |= _written("generation config", model.generation_config, source, (GENERATION_CONFIG,))
        except UserError:  # it is only carried along: sampling has the run's own settings
            content[GENERATION_CONFIG] = model.generation_config.to_json_string(use_diff=True).encode()
    return content | _written("tokenizer", tokenizer, source, OF_TOKENIZER)


def _written(what: str, described: Any, source: str, names: tuple[str, ...]) -> dict[str, bytes]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            described.save_pretrained(folder)
            return _read(Path(folder))
    except Exception as error:  # transformers' checks raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if found := _originals(source, names):
            return found
        raise UserError(
            f"model.path: the {what} of {source or 'the model'} could not be saved with a checkpoint: {reason}; mend "
            "its file in a copy of the model's folder, and give that"
        ) from None


def _read(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _originals(source: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """Returns those of the files that the model's folder has, or the cache of a hub id."""
    from transformers.utils import cached_file

    found = {}
    for name in names:
        path = Path(source) / name
        if source and not path.is_file() and not Path(source).exists():
            at = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
            path = Path(at) if at else path
        if source and path.is_file():
            found[name] = path.read_bytes()
    return found


def copy_beside(source: Path, target: Path) -> None:
    """Copies what a checkpoint's model folder has beside weights and config, as it is: text, and nothing that runs."""
    for path in sorted(p for p in source.rglob("*") if p.is_file() and p.suffix in PLAIN):
        if not path.name.endswith(".index.json") and path.name != CONFIG:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
