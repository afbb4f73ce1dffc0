"""Write files whole or not at all, and name files that cannot be read."""

import errno
import gzip
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.errors import InputError
from common.files import read_json, read_text, remove_leftovers, replacing, write_json, write_text

REPOSITORY = Path(__file__).parent.parent
HINT = "make it again with the press"


@pytest.fixture
def old(tmp_path) -> Path:
    """Return an existing file."""
    path = tmp_path / "folder" / "numbers.txt"
    write_text(path, "old")
    return path


def assert_untouched(old: Path) -> None:
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == [old.name]  # noqa: PTH208 (hidden files count too)


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_written_file_reads_back_and_nothing_else_is_left(tmp_path):
    value, surrogate = {"name": "Größe", "sizes": [8, 16]}, {"\ud800": "ν"}
    write_text(tmp_path / "new" / "a.txt", "ν and 葉\n")
    write_json(tmp_path / "new" / "a.json", value)
    (tmp_path / "new" / "a.gz").write_bytes(gzip.compress("naïve".encode()))
    assert read_text(tmp_path / "new" / "a.txt", HINT) == "ν and 葉\n"
    assert read_text(tmp_path / "new" / "a.gz", HINT) == "naïve"
    assert read_json(tmp_path / "new" / "a.json", HINT) == value
    assert "Größe" in (tmp_path / "new" / "a.json").read_text(encoding="utf-8").splitlines()[1]  # for people
    write_json(tmp_path / "new" / "a.json", surrogate)
    assert read_json(tmp_path / "new" / "a.json", HINT) == surrogate
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.gz", "a.json", "a.txt", "new"]


def test_the_old_file_stays_until_the_new_one_is_whole(old):
    with replacing(old) as temporary:
        temporary.write_text("half")
        assert old.read_text() == "old"
        assert temporary.parent == old.parent  # a rename needs the same file system
        assert temporary.name.startswith(".") and temporary.suffix == ".tmp"  # if the process is killed
    assert old.read_text() == "half"
    assert old.stat().st_mode & 0o777 == 0o644
    assert len(list(old.parent.iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError("bad numbers"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_its_error_unchanged(old, error):
    with pytest.raises(type(error)) as raised, replacing(old) as temporary:
        temporary.write_text("half")
        raise error
    assert raised.value is error
    assert_untouched(old)


@pytest.mark.parametrize("step", [(os, "fsync"), (Path, "replace")], ids=["fsync", "rename"])
def test_a_disk_that_is_full_at_the_end_leaves_the_old_file(old, monkeypatch, step):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*step, full)
    with pytest.raises(InputError, match=r"cannot write .*numbers\.txt: No space left on device; free space"):
        write_text(old, "new")
    assert_untouched(old)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_file(old):
    limit_file_size = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from pathlib import Path; from common.cli import run_cli; from common.files import write_text\n"
        "run_cli(lambda: write_text(Path(sys.argv[1]), 'new ' * 10_000))"
    )
    command = [sys.executable, "-c", limit_file_size, str(old)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"cannot write {old}: File too large" in done.stderr
    assert_untouched(old)


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_middle_leaves_the_old_file(old):
    write_half = (
        "import sys, time; from pathlib import Path; from common.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print('half written', flush=True)\n"
        "    time.sleep(60)"
    )
    command = [sys.executable, "-c", write_half, str(old)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half written\n"
        process.kill()
    assert old.read_text() == "old"


def test_leftovers_of_dead_processes_are_removed_and_those_at_work_stay(old):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    with replacing(old) as at_work:
        mine = at_work.name
        left = old.with_name(mine.replace(f"-{os.getpid()}.", f"-{dead.pid}."))
        unknown = old.with_name(f".{old.name}.abc.tmp")  # of an earlier version
        other = old.with_name(mine.replace(old.name, "other").replace(f"-{os.getpid()}.", f"-{dead.pid}."))
        left.mkdir()
        for path in (left / "deep", unknown, other):
            path.touch()
        remove_leftovers(old.parent, old.name)
        assert {path.name for path in old.parent.iterdir()} == {old.name, mine, unknown.name, other.name}
        os.utime(unknown, (1, 1))
        remove_leftovers(old.parent, old.name)
        assert not unknown.exists()


def test_concurrent_writers_leave_the_whole_file_of_one(tmp_path):
    texts = [letter * 200_000 for letter in "abcdef"]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "a.txt", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.txt").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_named(old):
    with pytest.raises(InputError, match=r"cannot write .*numbers\.txt/below\.txt"):
        write_text(old / "below.txt", "text")
    assert_untouched(old)


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("empty.gz", gzip.compress(b""), "is empty"),
        ("no-bytes.gz", b"", "is empty"),
        ("latin1.txt", "naïve".encode("latin-1"), "is not UTF-8 (byte 2)"),
        ("latin1.gz", gzip.compress("naïve".encode("latin-1")), "is not UTF-8 (byte 2)"),
        ("truncated.gz", gzip.compress(b"text " * 100)[:-10], "cannot be read"),
        ("plain.gz", b"plain text, not gzipped", "cannot be read"),
        ("damaged.gz", gzip.compress(bytes(range(256)))[:40] + b"\0" * 300, "cannot be read"),
        ("", None, "cannot be read"),  # a folder
        ("literal.json", b"{'a': 1}", "is not JSON ("),
        ("cut.json", b'{"a": 1', "is not JSON ("),
        ("two.json", b"{} {}", "is not JSON ("),
        ("nested.json", b"[" * 100_000, "is not JSON (nested more than 64 deep)"),
        ("deep.json", b'{"a":' * 65 + b"1" + b"}" * 65, "is not JSON (nested more than 64 deep)"),
        ("long.json", b'{"a": -%s}' % (b"1" * 5000), "is not JSON (Exceeds the limit (4300 digits)"),
        ("bomb.gz", gzip.compress(bytes(1 << 20)), "has more than 100,000 bytes"),
        ("x" * 256, None, "cannot be read"),
        ("a\0b", None, "cannot be read"),
        ("\ud800\udfff.json", None, "cannot be read"),
        ("list.json", b"[1, null]", "is not a JSON object"),
        ("null.json", b"null", "is not a JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        (read_json if path.suffix == ".json" else read_text)(path, HINT, limit=100_000)
    message = str(raised.value)
    assert message.startswith(f"{path} {problem}")
    assert message.endswith(f"; {HINT}")


def test_a_fifo_is_refused_at_once_instead_of_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path / "config.json", HINT)


def test_a_byte_order_mark_is_left_out(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [[1]]}')
    assert read_json(tmp_path / "a.json", HINT) == {"a": [[1]]}
