"""Rows of text columns from JSONL, CSV or a Hugging Face data set; errors name the file and the line."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, dict[str, Any]]
"""Where a row stands, as ``file:line``, and its columns."""

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_rows(source: str, option: str, default_split: str) -> Iterator[Row]:
    """Yield the rows of a source.

    Args:
        source: a ``.jsonl``, ``.json``, ``.ndjson``, ``.csv`` or ``.tsv`` file; or a folder (of
            ``Dataset.save_to_disk``, or of data files) or the name of a Hugging Face data set, as
            ``NAME[:CONFIG][#SPLIT]``.
        option: name of the option that gave the source, for messages.
        default_split: split of a Hugging Face data set where the source names none.

    Raises:
        ValueError: if the source is missing, unreadable or broken; the message names the place.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES or suffix in CSV_DELIMITERS:
        text = _text(path, option)
        return _json_rows(source, text) if suffix in JSON_SUFFIXES else _csv_rows(source, text, CSV_DELIMITERS[suffix])
    if path.is_file():
        known = ", ".join((*JSON_SUFFIXES, *CSV_DELIMITERS))
        raise ValueError(f"{option}: cannot tell the format of {source!r}: its name must end in one of {known}")
    return _dataset_rows(source, option, default_split)


def _text(path: Path, option: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{option}: cannot read {str(path)!r}: {error.strerror or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text (byte {raw[error.start]:#04x}); save it as UTF-8") from None


def _json_rows(source: str, text: str) -> Iterator[Row]:
    is_list = source.lower().endswith(".json") and text.lstrip().startswith("[")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        if is_list:
            raise ValueError(
                f"{where}: expected one JSON object per line, got a list: write every object on a line of its own, "
                "without brackets and commas around them"
            )
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: JSON that cannot be read: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected one JSON object per line, got {type(row).__name__}")
        yield where, row


def _csv_rows(source: str, text: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 kB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        where = f"{source}:{start}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}: broken CSV: {error}") from None
        start = reader.line_num + 1
        if cells is None:
            return
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(f"{where}: a column name appears twice in {listed(header)}")
        elif len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} cells, but the header has {len(header)} columns: {listed(header)}")
        else:
            yield where, dict(zip(header, cells, strict=True))


def _dataset_rows(source: str, option: str, default_split: str) -> Iterator[Row]:
    name, _, split = source.partition("#")
    split = split or default_split
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"{option}: {source!r} is no .jsonl or .csv file; to read it as a Hugging Face data set or folder, "
            "install the package: pip install 'cvae-lightning[datasets]'"
        ) from None
    try:
        if any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):  # of save_to_disk
            table = datasets.load_from_disk(name)
        else:
            repository, _, config = name.partition(":")
            table = datasets.load_dataset(repository, config or None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: cannot load the data set {name!r}: {error}") from None
    except _dataset_errors(datasets) as error:  # which say only that something is wrong
        cause = error.__cause__ or error
        raise ValueError(f"{option}: cannot load the data set {name!r}: {cause!s:.300}") from None
    if isinstance(table, dict):
        if split not in table:
            raise ValueError(f"{option}: the data set {name!r} has no split {split!r}; it has {', '.join(table)}")
        table = table[split]
    return ((f"{name}#{split}:{number}", dict(row)) for number, row in enumerate(table, 1))


def _dataset_errors(datasets: Any) -> tuple[type[Exception], ...]:
    found = getattr(getattr(datasets, "exceptions", None), "DatasetsError", None)
    return () if found is None else (found,)


def listed(names: Iterable[str]) -> str:
    """Return names for a message, shortened where a file has many or long ones.

    Example:
        >>> print(listed(["x", "y" * 50, *"abcdefgh"]))
        'x', 'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy, 'a', 'b', 'c', 'd', 'e', 'f', and 2 more
    """
    names = list(names)
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(f"{name!r:.40}" for name in names[:8]) + more
