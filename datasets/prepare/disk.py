"""The filters of datasets/prepare/sequences.py in DuckDB on disk, for events that do not fit into memory."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from datasets.prepare.events import Chunk, Events, check_events, event_chunks, event_file
from datasets.prepare.readers.columns import Columns

CONFIG: dict[str, Any] = {"memory_limit": "1GB", "preserve_insertion_order": False}  # what is beyond is on disk
IDS = {"u": "user_id", "i": "item_id"}  # numbers and what they number


def read_core(path: Path, columns: Columns, folder: Path, ties: str, **filters: Any) -> Events:
    """Read events and return those of the k-core: make_sequences makes the same of them as of all.

    folder: where the tables are meanwhile; it is removed. ties and filters are those of make_sequences.
    Raises InputError if the file is damaged, nothing is left or duckdb is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise InputError("--counts duckdb needs DuckDB: pip install 'duckdb>=1.1,<2'; or leave --counts out") from None
    if ties == "shuffle":
        raise InputError("--ties shuffle needs all events in memory; give --ties file or drop_user, or --counts memory")
    shutil.rmtree(folder, ignore_errors=True)  # left by a kill
    folder.mkdir(parents=True)
    try:
        with duckdb.connect(folder / "events.duckdb", config=CONFIG) as database:
            return _core(database, path, columns, **filters)
    except duckdb.Error as error:
        raise InputError(f"DuckDB failed in {folder} ({error}); make room there, or give --counts memory") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _core(
    database: Any, path: Path, columns: Columns, min_uc: int, min_sc: int, min_rating: float, repeats: str
) -> Events:
    file, counts = event_file(path), list[dict[str, Any]]()

    def count(name: str) -> None:
        found = database.execute("SELECT count(DISTINCT u), count(DISTINCT i), count(*) FROM events").fetchone()
        counts.append(dict(zip(("after", "users", "items", "interactions"), (name, *found), strict=True)))

    def remove(where: str) -> int:
        return database.execute(f"DELETE FROM events WHERE {where}").fetchone()[0]

    def keep_first(same: str, order: str) -> int:
        """Keep the first event, in `order`, of those with the `same` columns; return the number of others."""
        ranked = f"SELECT place, row_number() OVER (PARTITION BY {same} ORDER BY {order}) AS rank FROM events"
        return remove(f"place IN (SELECT place FROM ({ranked}) WHERE rank > 1)")

    database.execute("CREATE TABLE raw (place LONG, user_id BLOB, item_id BLOB, time DOUBLE, rating FLOAT, line LONG)")
    database.begin()
    place = 0
    for chunk in event_chunks(file, columns):
        chunk_table = _table(chunk, place)  # DuckDB finds it by its name
        place += len(chunk_table)
        database.execute("INSERT INTO raw SELECT * FROM chunk_table")
    database.commit()
    notes = check_events(file)
    for number, key in IDS.items():  # users and items are numbered by their first line
        numbered = f"SELECT {key}, row_number() OVER (ORDER BY min(place)) AS {number} FROM raw GROUP BY {key}"
        database.execute(f"CREATE TABLE of_{number} AS {numbered}")
    joined = "raw JOIN of_u USING (user_id) JOIN of_i USING (item_id)"
    database.execute(f"CREATE TABLE events AS SELECT place, u, i, time, rating, line FROM {joined}")
    database.execute("DROP TABLE raw")
    count("reading")
    if copies := keep_first("u, i, time, rating, line", "place"):
        notes.append(f"{copies:,} events are copies of another: counted once")
        count("copies of a line left out")
    if min_rating > 0:
        remove(f"isnan(rating) OR rating < {min_rating}::FLOAT")
        count(f"ratings below {min_rating:g} left out")
    if repeats == "drop":
        keep_first("u, i", "time, place")
        count("repeats left out")
    rare = "{0} IN (SELECT {0} FROM events GROUP BY {0} HAVING count(*) < {1})"
    while remove(f"{rare.format('u', min_uc)} OR {rare.format('i', min_sc)}"):
        pass
    found = database.execute("SELECT u, i, time, rating FROM events ORDER BY place").fetchnumpy()
    if not len(found["u"]):
        raise InputError(f"the filters leave none of {place:,} events; lower --min_uc, --min_sc or --min_rating")
    numbers, names = {}, {}
    for n, key in IDS.items():
        numbers[n] = np.unique(found[n], return_inverse=True)[1].astype(np.int32)
        query = f"SELECT {key} FROM of_{n} WHERE {n} IN (SELECT {n} FROM events) ORDER BY {n}"
        names[n] = [text.decode("utf-8", "surrogatepass") for (text,) in database.execute(query).fetchall()]
    time, rating, line = *(np.asarray(found[name]) for name in ("time", "rating")), np.arange(len(found["u"]))
    return Events(names["u"], names["i"], numbers["u"], numbers["i"], time, rating, line, notes, tuple(counts))


def _table(chunk: Chunk, place: int) -> Any:
    """Return a chunk as an Arrow table. place: of its first event. Ids are bytes: JSON may hold lone surrogates."""
    import pyarrow as pa  # type: ignore[import-untyped]

    ids = [pa.array([name.encode("utf-8", "surrogatepass") for name in names], pa.binary()) for names in chunk[:2]]
    line = pa.nulls(len(chunk.time), pa.int64()) if chunk.line is None else chunk.line
    columns = [np.arange(place, place + len(chunk.time)), *ids, chunk.time, chunk.rating, line]
    return pa.table(columns, names=["place", *IDS.values(), "time", "rating", "line"])
