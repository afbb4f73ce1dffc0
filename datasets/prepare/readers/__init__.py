"""Readers of what people hold: one object per format, recognised by a file's content, not by its name.

    format                          events                                    items
    JSON lines or Python literals   Amazon 2014, 2018, 2023, or usual names   an object a line
    JSON array, or object around    the same                                  the same
    LETTER *.inter.json, .item.json {"0": [3, 7, ...], ...}                   {"0": {"title": ...}, ...}
    parquet, or a folder of parts   columns by name (Hugging Face's too)      columns by name
    CSV, TSV, RecBole atomic files  columns by name                           columns by name
    Amazon ratings without header   2014 user,item,... or 2018 item,user,...
    MovieLens                       u.data, ratings.dat, ratings.csv          u.item, movies.dat, movies.csv
    S3Rec and P5 text               a line per user: user item item ...

gzip and zstd are unpacked. Names of columns: datasets/prepare/readers/base.py.
A new format is a new object in READERS.
"""

from pathlib import Path

from common.errors import InputError
from datasets.prepare.readers.base import HINT, Head, Reader
from datasets.prepare.readers.lines import JsonArray, JsonLines, KeyedJson, SequenceText
from datasets.prepare.readers.tables import HEADERLESS, AmazonRatings, Parquet, Table

READERS: tuple[Reader, ...] = (
    Parquet(),  # the only one that reads folders
    KeyedJson(),
    JsonArray(),
    JsonLines(),
    *HEADERLESS,
    AmazonRatings(),
    SequenceText(),
    Table(),
)


def find_reader(path: Path) -> Reader:
    """Return the reader of a file's format. Raises InputError if there is none."""
    head = Head.of(path)
    if path.is_dir():
        if not READERS[0].recognises(head):
            raise InputError(f"{path} is a folder without parquet files; give one of its files")
        return READERS[0]
    if not head.lines or head.text.strip() in ("[]", "{}"):
        raise InputError(f"{path} is empty; {HINT}")
    for reader in READERS:
        if reader.recognises(head):
            return reader
    rest = Head(path, "\n".join(head.lines[1:]).encode())
    for reader in HEADERLESS:
        if rest.lines and reader.recognises(rest):
            raise InputError(
                f"{path}:1: {head.lines[0][:60]!r} is not {reader.separator.join(reader.fields)}, as the lines below "
                f"it are; correct or remove it"
            )
    names = ", ".join(reader.name for reader in READERS)
    raise InputError(f"{path} is of no known format (it begins with {head.lines[0][:60]!r}); accepted are {names}")
