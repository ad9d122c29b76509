"""Reads rows of files, folders and the hub: JSON Lines, a JSON array, CSV, Parquet, compressed by gzip or not.

A row is a dictionary of columns. What a file is, its first bytes say, and where they do not, its name does.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eepo_fast.types import UserError

Row = dict[str, Any]
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # what such files begin with
SUFFIXES = {".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = "JSON Lines, a JSON array, .csv, .tsv or .parquet, .gz or not"


class Place(NamedTuple):
    """Says where a row stands."""

    file: str
    kind: str
    """What rows are called there: `line`, counted from 1, or `row`, from 0 as data sets count them."""
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.kind} {self.number}"


def suffix_of(path: Path) -> str:
    """Returns the ending that says what a file holds, without .gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_file(path: Path) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of a file; UserError where it cannot be read or is of no kind that is known."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if start == PARQUET:
        yield from _read_parquet(path)
    elif suffix_of(path) in SEPARATORS:
        yield from _read_csv(path)
    elif _first_character(path) == "[":
        yield from _read_array(path)
    else:
        for number, row in iter_jsonl(path):
            yield Place(str(path), "line", number), row


def read_folder(folder: Path, files: str | None, split: str, asked_by: str) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of a folder's files: of those that `files` names, or those of the split, as data sets of the hub
    name them (train.parquet, data/test-00000.csv; where no name says so, all are training data)."""
    from datasets.data_files import DataFilesList, EmptyDatasetError, get_data_patterns

    base = str(folder.resolve())
    try:
        patterns = {split: [files]} if files else get_data_patterns(base)
        if split not in patterns and patterns == {"train": ["**"]}:  # no name says so, and all files are meant
            split = "train"
        if split not in patterns:
            raise UserError(f"{asked_by}: {folder} has no split {split}, found {', '.join(map(str, patterns))}")
        found = {Path(name) for name in DataFilesList.from_patterns(patterns[split], base_path=base)}
    except (EmptyDatasetError, FileNotFoundError, ValueError) as error:
        where = f"file {files} in {folder}" if files else f"data file in {folder}"
        raise UserError(f"{asked_by}: no {where}: {str(error).splitlines()[0]}") from None
    readable = sorted(path for path in found if files or suffix_of(path) in SUFFIXES)
    if not readable:
        raise UserError(f"{asked_by}: no data file in {folder}; expected {KINDS}")
    for path in readable:
        yield from read_file(path)


def read_hub(
    name: str, files: str | None, *, revision: str | None, subset: str | None, split: str, asked_by: str
) -> Iterator[tuple[Place, Row]]:
    """Yields the rows of a hub data set, or of a folder that describes itself as one, in a README.md."""
    from datasets import load_dataset

    try:
        rows = enumerate(load_dataset(name, subset, data_files=files, revision=revision, split=split))
        yield from ((Place(name, "row", number), row) for number, row in rows)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises many kinds; the user needs the name and the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "a folder, and" if Path(name).is_dir() else "no file or folder, and from the hub it"
        raise UserError(f"{asked_by}: {name} is {kind} could not be loaded: {reason}") from None


def iter_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Yields (line number from 1, object) of lines that are not blank; UserError on all but JSON objects in UTF-8."""
    with _opened(path) as file:
        for number, raw in enumerate(_lines(file, path), 1):
            # a first line that is no JSON says that the file is likely of another kind
            hint = f"; expected {KINDS}" if number == 1 else ""
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8{hint}"
                ) from None
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # ValueError also where a number has too many digits
                raise UserError(f"{path}, line {number}: not valid JSON: {error}{hint}") from None
            if not isinstance(row, dict):
                found = type(row).__name__
                raise UserError(f"{path}, line {number}: expected a JSON object, found a {found}{hint}")
            yield number, row


def _opened(path: Path) -> Any:
    try:
        file = path.open("rb")
        zipped = file.read(2) == GZIP
        file.seek(0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return gzip.open(file) if zipped else file


def _lines(file: Any, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except (OSError, EOFError, zlib.error) as error:  # a disk's fault, or a .gz that is cut off
        raise UserError(f"{path}: cannot be read: {error}; is the file whole?") from None


def _whole_text(path: Path) -> str:
    with _opened(path) as file:
        try:
            return b"".join(_lines(file, path)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None


def _first_character(path: Path) -> str:
    with _opened(path) as file:
        for line in _lines(file, path):
            if text := line.decode("utf-8-sig", errors="replace").strip():
                return text[0]
    return ""


def _read_array(path: Path) -> Iterator[tuple[Place, Row]]:
    try:
        rows = json.loads(_whole_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}; expected {KINDS}") from None
    for number, row in enumerate(rows):
        place = Place(str(path), "row", number)
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected a JSON object, found a {type(row).__name__}")
        yield place, row


def _read_csv(path: Path) -> Iterator[tuple[Place, Row]]:
    """Yields rows whose values are the text that stands there: nothing is taken for a number or a date."""
    csv.field_size_limit(sys.maxsize)
    text = io.StringIO(_whole_text(path), newline="")
    # strict: a quote that is never closed would make one row of all that follows
    reader = csv.DictReader(text, delimiter=SEPARATORS[suffix_of(path)], strict=True)
    number = 0
    try:
        if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
            raise UserError(f"{path}: column {twice[0]!r} is there twice; rename one")
        for number, row in enumerate(reader):
            if row.pop(None, None) is not None:  # type: ignore[bad-argument-type]  # csv's name for what is too much
                raise UserError(
                    f"{path}, row {number}: more values than the {len(row)} columns of the first line; put text with "
                    "a separator in it into quotes"
                )
            yield Place(str(path), "row", number), row
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: not valid CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[Place, Row]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield Place(str(path), "row", number), row
                    number += 1
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}, row {number}: cannot be read as Parquet: {reason}") from None
