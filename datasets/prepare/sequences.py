"""Events to sequences: filters down to the k-core, histories in the order of time, users and items numbered.

The filters work in memory, or by DuckDB on disk. n events, U users, N items.
"""

import shutil
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import InputError
from datasets.catalog import MIN_ITEMS, Sequences
from datasets.prepare.read import Chunk, Events, check_events, event_chunks, event_file
from datasets.prepare.readers.base import Columns

NO_RATINGS = "no event has a rating; leave --min_rating out, or name the column of ratings: --columns rating=..."


@dataclass(frozen=True)
class Prepared:
    """Sequences of user rows 0..U-1 over items 1..N, and whose they are."""

    sequences: Sequences
    users: list[str]  # [U]
    items: list[str]  # [N]; item i is items[i - 1]
    filters: list[dict[str, Any]]  # users, items and interactions after each
    notes: list[str]  # on copies, repeats and ties


def make_sequences(
    events: Events,
    *,
    min_uc: int,
    min_sc: int,
    min_rating: float = 0.0,
    repeats: str = "keep",
    ties: str = "file",
    split: tuple[str, str] | None = None,
) -> Prepared:
    """Filter events down to the k-core, and order and number them.

    Copies of a line are one event. Events rated below `min_rating` are left out (0: none); with `repeats` "drop" all
    but a user's first event with an item; and then, until none is left, users with fewer than `min_uc` events and items
    with fewer than `min_sc`.

    A history is in the order of time. Events of one user at the same time stay in the file's order with `ties` "file",
    and are shuffled (always alike) with "shuffle"; "drop_user" leaves out users whose last two events have the same
    time, as nothing but the file's order tells which is the target. Users are numbered in the order of their first
    line, items in the order of their first appearance when the users' histories are read in turn.

    split: when validation and test begin, for a split by time; None for leave-one-out.

    Raises InputError if nothing is left, naming a k that would leave something.
    """
    filters = list(events.filters)

    def count(name: str, rows: np.ndarray) -> None:
        if any(step["after"] == name for step in events.filters):
            return
        users, items = (len(np.unique(column[rows])) for column in (events.user, events.item))
        filters.append({"after": name, "users": users, "items": items, "interactions": len(rows)})

    rows = np.lexsort((events.time, events.user))  # stable, so that equal times stay in the file's order
    count("reading", rows)
    once = drop_copies(events, rows)
    notes = [f"{len(rows) - len(once):,} events are copies of another: counted once"] if len(once) < len(rows) else []
    rows = once
    if notes:
        count("copies of a line left out", rows)
    if min_rating > 0:
        if np.isnan(events.rating).all():
            raise InputError(NO_RATINGS)
        rows = rows[events.rating[rows] >= min_rating]  # an event without rating fails too
        count(f"ratings below {min_rating:g} left out", rows)
    if ties == "shuffle":
        chance = np.random.default_rng(0).permutation(len(events.time))
        rows = rows[np.lexsort((chance[rows], events.time[rows], events.user[rows]))]
    if repeats == "drop":
        rows = rows[first_of_pairs(events, rows)]
        count("repeats left out", rows)
    before = rows
    while True:
        core = k_core(events.user[rows], events.item[rows], min_uc, min_sc)
        if not len(core) and len(rows) < len(before):
            raise InputError("no user's last two events have different times; --ties file or shuffle keeps the users")
        if not len(core):
            message = _nothing_left(events.user[before], events.item[before], min_uc, min_sc)
            raise InputError("; ".join([message, *notes]))
        rows = rows[core]
        tied = last_two(events.user[rows], events.time[rows])
        if ties != "drop_user" or not len(tied):
            break
        rows = rows[~np.isin(events.user[rows], tied)]
    dropped = " without users whose last two tie" if ties == "drop_user" else ""
    count(f"{min_uc}-core of users, {min_sc}-core of items{dropped}", rows)

    user, item = events.user[rows], events.item[rows]
    users, lengths = np.unique(user, return_counts=True)
    if lengths.max() < MIN_ITEMS and not split:
        raise InputError(
            f"no user has {MIN_ITEMS} events or more (one each to train, validate and test on); give more events, or "
            f"lower --min_sc"
        )
    repeated = len(rows) - len(first_of_pairs(events, rows))
    if repeated:
        notes.append(
            f"{repeated:,} interactions repeat an item of the same user; --repeats drop keeps the first, as the "
            f"benchmark splits of Amazon 2023 do"
        )
    notes += [
        f"{len(found):,} of {len(users):,} users ({len(found) / len(users):.1%}) {what}"
        for found, what in (
            (last_two(user, item), "have the item before their target as the target again"),
            (tied, f"have their last two events at the same time: --ties {ties} decides which is the target"),
        )
        if len(found)
    ]
    items, first, code = np.unique(item, return_index=True, return_inverse=True)
    notes += [
        f"there is only one {what}: ranks say nothing; give the events of more, or lower --min_uc and --min_sc"
        for what, found in (("user", users), ("item", items))
        if len(found) == 1
    ]
    order = np.argsort(first)  # items by first appearance
    number = np.empty(len(items), dtype=np.int64)
    number[order] = np.arange(1, len(items) + 1)
    sequences = Sequences(number[code], np.concatenate([[0], np.cumsum(lengths)]))
    if split:
        cuts = time_cuts(events.time[rows], sequences.offsets, split)
        sequences = replace(sequences, split=f"time {split[0]} {split[1]}", cuts=cuts)
    names = [events.users[u] for u in users], [events.items[i] for i in items[order]]
    return Prepared(sequences, *names, filters, notes)


def time_cuts(time: np.ndarray, offsets: np.ndarray, split: tuple[str, str]) -> np.ndarray:
    """Return how many events of each user come before validation and before the test: [U, 2] int64.

    time: [n] in the file's unit, sorted by user and time. Raises InputError if a period has no user to evaluate.
    """
    unit = next((unit for unit in (1, 10**3, 10**6, 10**9) if time.max() < 10**11 * unit), 1)  # per second
    val, test = (_moment(text, unit) for text in split)
    found = f"the events are from {_date(time.min(), unit)} to {_date(time.max(), unit)}"
    if not val < test:
        raise InputError(f"--val_from {split[0]} is not before --test_from {split[1]}; {found}")
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    before = [np.bincount(users[time < moment], minlength=len(offsets) - 1) for moment in (val, test)]
    ends = [*before, np.diff(offsets)]
    for part, first, last in (("validation", 0, 1), ("test", 1, 2)):
        if not np.any((ends[first] > 0) & (ends[last] > ends[first])):
            raise InputError(
                f"no user has an event in the {part} period of --val_from {split[0]} --test_from {split[1]} and one "
                f"before it; {found}: choose dates between them"
            )
    return np.column_stack(before)


def _moment(text: str, unit: int) -> float:
    """Return a time in the file's unit: an epoch number as it is, or the ISO date in UTC."""
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() * unit


def _date(time: float, unit: int) -> str:
    """Return a time as the file's number and as a date."""
    return f"{time:.0f} ({datetime.fromtimestamp(time / unit, UTC):%Y-%m-%d})"


def drop_copies(events: Events, rows: np.ndarray) -> np.ndarray:
    """Return rows, sorted by user and time, without all but the first copy of each line."""
    import pandas as pd

    same = (np.diff(events.user[rows]) == 0) & (np.diff(events.time[rows]) == 0)
    near = np.flatnonzero(np.r_[False, same] | np.r_[same, False])  # only these can be copies
    columns = {name: getattr(events, name)[rows[near]] for name in ("user", "item", "time", "rating")}
    if events.line is not None:
        columns["line"] = events.line[rows[near]]
    return np.delete(rows, near[pd.DataFrame(columns).duplicated().to_numpy()])


def first_of_pairs(events: Events, rows: np.ndarray) -> np.ndarray:
    """Return the places in `rows` of the first event of each user with each item."""
    pairs = events.user[rows].astype(np.int64) * len(events.items) + events.item[rows]
    return np.sort(np.unique(pairs, return_index=True)[1])


def last_two(user: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the users whose last two rows have the same value. Rows are sorted by user."""
    ends = np.flatnonzero(np.r_[np.diff(user) != 0, True]) if len(user) else np.empty(0, dtype=int)
    ends = ends[ends > 0]
    return user[ends[(user[ends - 1] == user[ends]) & (value[ends - 1] == value[ends])]]


def k_core(user: np.ndarray, item: np.ndarray, min_uc: int, min_sc: int) -> np.ndarray:
    """Return the rows [n'] of the largest set of events [n] with `min_uc` of every user and `min_sc` of every item."""
    rows = np.arange(len(user))
    while True:
        users, items = user[rows], item[rows]
        stays = (np.bincount(users)[users] >= min_uc) & (np.bincount(items)[items] >= min_sc)
        if stays.all():
            return rows
        rows = rows[stays]


def _nothing_left(user: np.ndarray, item: np.ndarray, min_uc: int, min_sc: int) -> str:
    """Return the error that names the smallest change to one of the two, or to both, that leaves something."""
    if not len(user):
        return "no event is left before the k-core: lower --min_rating"
    uc, sc = (min(k, int(np.bincount(column).max())) for k, column in ((min_uc, user), (min_sc, item)))

    def largest(pair: Callable[[int], tuple[int, int]], most: int) -> tuple[int, int]:
        """Return the pair of the largest k up to `most` that leaves something; of 0 if none does."""
        return pair(bisect_left(range(1, most + 1), True, key=lambda k: not len(k_core(user, item, *pair(k)))))

    pairs = [
        largest(lambda k: (k, min_sc), uc),
        largest(lambda k: (min_uc, k), sc),
        largest(lambda k: (min(k, min_uc), min(k, min_sc)), max(uc, sc)),
    ]
    better = min((pair for pair in pairs if 0 not in pair), key=lambda pair: min_uc + min_sc - sum(pair))
    return (
        f"the k-core leaves none of {len(user):,} events; --min_uc {better[0]} --min_sc {better[1]} would leave "
        f"{len(k_core(user, item, *better)):,} of them"
    )


# ----------------------------------------------------------------------------------------------------------------- disk
# The same filters in DuckDB on disk, for events that do not fit into memory.

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
        if not database.execute("SELECT count(*) FROM events WHERE NOT isnan(rating)").fetchone()[0]:
            raise InputError(NO_RATINGS)
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
