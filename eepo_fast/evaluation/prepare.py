"""`eepo-fast data prepare` writes a hub data set as JSON Lines, pinned to a revision, with its licence and checksum.

    data/NAME.jsonl            id, problem, answer, source
    data/NAME.manifest.json    where it came from, at which revision, under which licence, rows, sha256

Prepared again, the pinned revision must give the same bytes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eepo_fast.config import DataConfig
from eepo_fast.data.problems import read_problems
from eepo_fast.types import UserError

FOLDER = Path("data")
LOCAL = "local"  # the revision of a file or a folder


@dataclass(frozen=True)
class Manifest:
    name: str
    source: str
    """The hub name, or a file or folder."""
    revision: str
    """The hub's commit; `local` for a file or a folder."""
    licence: str
    """The licence as the data set's card states it."""
    files: str | None
    subset: str | None
    split: str
    columns: dict[str, str]
    answer_marker: str
    rows: int
    sha256: str


def manifest_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.manifest.json"


def is_prepared(path: Path) -> bool:
    """Returns whether a file is one that `prepare` wrote."""
    return path.suffix == ".jsonl" and manifest_file(path.parent, path.stem).is_file()


def read_manifest(path: Path) -> Manifest:
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of `eepo-fast data prepare`: {error}") from None


def find_prepared(name: str, source: str, folder: Path = FOLDER) -> Path | None:
    """Returns the file that was prepared from a hub name, under this name where there are several (splits, subsets).
    UserError where it is no longer what its manifest says, or it cannot be told which one is meant."""
    found = []
    for path in sorted(folder.glob("*.manifest.json")):
        try:
            found += [m for m in [read_manifest(path)] if m.source == source]
        except UserError:  # not ours, unless it is the one that is asked for
            if path == manifest_file(folder, name):
                raise
    chosen = [m for m in found if m.name == name] or found
    if len(chosen) > 1:
        names = ", ".join(f"{m.name} (split {m.split})" for m in chosen)
        raise UserError(f"evaluation data {name}: {source} is prepared as {names}; use one of these names, or the file")
    if not chosen:
        return None
    if chosen[0].name != name and chosen[0].split != "test":  # what was made to train on is not meant
        raise UserError(
            f"evaluation data {name}: {source} is prepared as {chosen[0].name}, of split {chosen[0].split}; use that "
            f"name if it is meant, or run `eepo-fast data prepare {name}={source}`"
        )
    file = folder / f"{chosen[0].name}.jsonl"
    check(file, chosen[0])
    return file


def check(file: Path, manifest: Manifest) -> None:
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if found != manifest.sha256:
        raise UserError(
            f"{file}: expected sha256 {manifest.sha256} of its manifest, found {found}; run `eepo-fast data prepare "
            f"{manifest.name}={manifest.source}` again"
        )


def prepare(
    name: str, source: str, config: DataConfig, *, folder: Path, revision: str | None, subset: str | None, split: str,
    say: Callable[[str], None] = print,
) -> Manifest:  # fmt: skip
    """Fetches, writes and pins one data set. config: columns, files and answer marker. revision: a commit; else the
    pinned one, else the newest. UserError where the hub cannot be reached, or gives other bytes than it gave before.
    say: is given lines on what is left out."""
    if revision and Path(source).expanduser().exists():
        raise UserError(f"--revision: expected none for {source}, which is no hub data set, found {revision}")
    path, file = manifest_file(folder, name), folder / f"{name}.jsonl"
    known = read_manifest(path) if path.is_file() else None
    found, licence = describe(source, revision or (known.revision if known else None))
    if known is not None and known.source != source:
        if {known.revision, found} != {LOCAL}:
            raise UserError(f"{path}: {name} was prepared from {known.source}, not from {source}; choose another name")
        say(f"{path}: prepared anew, from {source} instead of {known.source}")  # one's own files, which nothing pins
    pin = None if found == LOCAL else found
    read = read_problems(source, config, revision=pin, subset=subset, split=split, asked_by="data prepare")
    for line in read.checked(f"data prepare: {source}", config.max_bad):
        say(line)
    rows = [{"id": f"{name}/{i:06d}", "problem": p.problem, "answer": p.answer, "source": f"{source}@{found}"}
            for i, p in enumerate(read.problems)]  # fmt: skip
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    manifest = Manifest(
        name, source, found, licence, config.files, subset, split, config.columns.model_dump(), config.answer_marker,
        len(rows), hashlib.sha256(content).hexdigest(),
    )  # fmt: skip
    if known is not None and _request(known) == _request(manifest) and known.sha256 != manifest.sha256:
        raise UserError(
            f"{source} at {found} gives other rows than when {path} was written (sha256 {manifest.sha256}, expected "
            f"{known.sha256}); remove that file to accept them"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        path.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be written: {error.strerror}; choose another folder") from None
    return manifest


def _request(manifest: Manifest) -> Manifest:
    """Returns what was asked for, without what came."""
    return replace(manifest, rows=0, sha256="", licence="")


def describe(source: str, revision: str | None) -> tuple[str, str]:
    """Returns (revision, licence) of a hub data set, or of a file or folder, which may have a card."""
    from huggingface_hub import DatasetCard, HfApi

    if (path := Path(source).expanduser()).exists():
        card = path / "README.md"
        return LOCAL, _licence(DatasetCard.load(card).data if card.is_file() else None)
    try:
        info: Any = HfApi().dataset_info(source, revision=revision)
    except Exception as error:  # the hub's client raises many kinds; the user needs the name and the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data prepare: {source} cannot be read from the hub: {reason}") from None
    return info.sha, _licence(info.card_data)


def _licence(card: Any) -> str:
    value = getattr(card, "license", None)
    return ", ".join(value) if isinstance(value, list) else value or "not stated"
