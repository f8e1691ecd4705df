"""Files of master keys: who may read them, what they hold, how they change, and the commands."""

from __future__ import annotations

import base64
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from holdoff_coordinator.custody import key_files
from holdoff_coordinator.custody.key_files import (
    KeyDirectory,
    KeyFileError,
    create_key,
    key_paths,
    read_key,
    read_keys,
)
from tests.harness import coordinator_command

if TYPE_CHECKING:
    from click.testing import Result

KEY = base64.b64encode(b"k" * 32)
US = os.geteuid()
STRANGER = US + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a directory for keys."""
    path = tmp_path / "keys"
    path.mkdir(0o700)
    return path


def write(path: Path, raw: bytes = KEY, mode: int = 0o600) -> Path:
    """Write a file of a key."""
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    path.chmod(mode)
    return path


# What is created


def test_a_new_key_can_be_read(folder: Path) -> None:
    """By its owner alone, and it is the key that was made."""
    key = create_key(folder, "main")
    assert read_keys(folder) == {"main": key}
    assert stat.S_IMODE((folder / "main.key").stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["main.key"]
    assert key.created


def test_keys_are_random(folder: Path) -> None:
    """Fails when two keys have the same bytes."""
    keys = [create_key(folder, f"k{number}") for number in range(20)]
    assert len({key.secret for key in keys}) == len({key.check for key in keys}) == 20


def test_nothing_is_overwritten(folder: Path) -> None:
    """Of several at once one makes the key, and a key that exists stays as it is.

    Fails when a key is replaced by another one: what it sealed would be lost.
    """

    def create(_: None) -> bytes:
        try:
            return create_key(folder, "main").secret
        except KeyFileError as error:
            assert "exists" in str(error)  # noqa: PT017
            return b""

    with ThreadPoolExecutor(8) as threads:
        made = list(filter(None, threads.map(create, repeat(None, 16))))
    assert made == [read_keys(folder)["main"].secret]
    assert len(list(folder.iterdir())) == 1
    (folder / "link.key").symlink_to(folder / "nowhere")
    with pytest.raises(KeyFileError, match="exists"):
        create_key(folder, "link")
    assert not (folder / "nowhere").exists()


def test_a_new_key_survives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content is on the disk before it has its name, and then its name too.

    Fails when the file, its directory, or the directory of a new directory is not fsynced.
    """
    folder, synced = tmp_path / "new", list[tuple[str, bool]]()

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, (folder / "main.key").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    create_key(folder, "main")
    [parent, (draft, named), directory] = synced
    assert parent == (tmp_path.name, False)
    assert draft.startswith(".holdoff-")
    assert not named
    assert directory == ("new", True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when half a key, or a draft of one, remains."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        create_key(folder, "main")
    assert not list(folder.iterdir())


def test_a_directory_has_a_limit(folder: Path) -> None:
    """Fails when more keys can be made than are read."""
    for number in range(key_files.MOST_KEYS):
        write(folder / f"k{number}.key")
    with pytest.raises(KeyFileError, match="100 keys already"):
        create_key(folder, "one-more")
    write(folder / "one-more.key")
    with pytest.raises(KeyFileError, match="more than 100"):
        read_keys(folder)


# Who may read them


def status(uid: int, mode: int) -> os.stat_result:
    """Return what the system says about a file."""
    return os.stat_result((mode, 1, 1, 1, uid, 0, 1, 0, 0, 0))


@pytest.mark.parametrize(
    ("uid", "mode", "says"),
    [
        (US, 0o600, ""),
        (US, 0o400, ""),
        (0, 0o400, ""),
        (0, 0o440, ""),  # a Secret that Kubernetes mounts, a credential of systemd
        (0, 0o460, "chmod 600"),
        (0, 0o444, "chmod 600"),
        (US, 0o604, "chmod 600"),
        (US, 0o602, "chmod 600"),
        (STRANGER, 0o600, f"belongs to user {STRANGER}"),
        (STRANGER, 0o640, f"belongs to user {STRANGER}"),
    ],
)
def test_only_the_owner_reads_a_key(uid: int, mode: int, says: str) -> None:
    """Fails when others can read or change a key and it is used all the same."""
    found = status(uid, stat.S_IFREG | mode)
    if says:
        with pytest.raises(KeyFileError, match=says):
            key_files._require_private(Path("main.key"), found)
    else:
        key_files._require_private(Path("main.key"), found)


@pytest.mark.skipif(US == 0, reason="a file of root's may be readable by its group")
def test_no_group_reads_a_key_of_ours(folder: Path) -> None:
    """Fails when the group may read a file whose mode we can change."""
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_key(write(folder / "main.key", mode=0o640))


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o666, 0o620])
def test_a_key_that_others_read_is_refused(folder: Path, mode: int) -> None:
    """With what to do about it."""
    path = write(folder / "main.key", mode=mode)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        read_keys(folder)


@pytest.mark.skipif(US != 0, reason="only root gives files away")
def test_a_key_of_another_user_is_refused(folder: Path) -> None:
    """Also where the directory is theirs."""
    path = write(folder / "main.key")
    os.chown(path, STRANGER, -1)
    with pytest.raises(KeyFileError, match=f"main.key belongs to user {STRANGER}"):
        read_keys(folder)
    os.chown(path, US, -1)
    os.chown(folder, STRANGER, -1)
    with pytest.raises(KeyFileError, match=f"keys belongs to user {STRANGER}"):
        read_keys(folder)


@pytest.mark.parametrize(("mode", "fits"), [(0o755, True), (0o1777, True), (0o775, False)])
def test_who_may_write_into_the_directory(folder: Path, mode: int, *, fits: bool) -> None:
    """With the sticky bit others cannot replace a key; without it they could."""
    write(folder / "main.key")
    folder.chmod(mode)
    if fits:
        assert list(read_keys(folder)) == ["main"]
    else:
        with pytest.raises(KeyFileError, match="other users can change the keys"):
            read_keys(folder)


# What they hold


@pytest.mark.parametrize(
    "raw",
    [
        KEY,
        KEY + b"\n",
        b"# comment\r\n\r\n" + KEY + b"\r\n",
        b"\n  " + KEY + b"  \n# end",
        b"# \xff \xe2\x80\xae\n" + KEY,
    ],
)
def test_comments_and_line_ends_do_not_matter(folder: Path, raw: bytes) -> None:
    """A key that was edited by hand, or on another system, is the same."""
    key = read_key(write(folder / "main.key", raw))
    assert (key.id, key.secret, key.created) == ("main", b"k" * 32, "")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n",
        b"# created: 2026-11-30T20:00:00Z\n",
        KEY[:-4],
        KEY[:-1],
        KEY + b"=",
        KEY + KEY,
        KEY + b"\n" + KEY,
        b"\xef\xbb\xbf" + KEY,
        b"\xef\xbb\xbf# comment\n" + KEY,
        KEY.decode().encode("utf-16"),
        b"k" * 32,
        bytes(range(200, 232)),
        b"-----BEGIN PRIVATE KEY-----\n" + KEY + b"\n-----END PRIVATE KEY-----",
        b"#" * 5000 + b"\n" + KEY,
        base64.b64encode(b"k" * 31),
        base64.b64encode(b"k" * 33),
        KEY.replace(b"a", b"\0"),
        b"key = " + KEY,
    ],
)
def test_what_is_not_a_key_is_refused(folder: Path, raw: bytes) -> None:
    """The error names the file, and shows nothing of its content."""
    path = write(folder / "main.key", raw)
    with pytest.raises(KeyFileError) as refused:
        read_key(path)
    says = str(refused.value)
    assert says.startswith(f"{path} is not a key")
    assert says.isprintable()
    assert "a2tra2" not in says
    assert refused.value.__context__ is None


def test_a_huge_file_costs_nothing(folder: Path) -> None:
    """Fails when all of it is read into memory."""
    path = write(folder / "main.key")
    os.truncate(path, 1 << 40)
    with pytest.raises(KeyFileError, match="is not a key"):
        read_key(path)


def test_what_is_not_a_file_is_refused(folder: Path) -> None:
    """Fails when a FIFO is waited for, or a device is read."""
    os.mkfifo(folder / "fifo.key", 0o600)
    (folder / "directory.key").mkdir()
    (folder / "device.key").symlink_to("/dev/zero")
    (folder / "loop.key").symlink_to("loop.key")
    (folder / "nowhere.key").symlink_to("nothing")
    told = {}
    for path in key_paths(folder):
        with pytest.raises(KeyFileError) as refused:
            read_key(path)
        told[path.stem] = str(refused.value).replace(str(folder), "")
    assert told == {
        "fifo": "/fifo.key is not a regular file",
        "directory": "/directory.key is not a regular file",
        "device": "/device.key is not a regular file",
        "loop": "cannot read /loop.key: Too many levels of symbolic links",
        "nowhere": "cannot read /nowhere.key: No such file or directory",
    }


@pytest.mark.parametrize("name", ["Main", "a_b", "a.b", "x" * 64, "\x1b[2J", "a\nb", "\udcff", "ä"])
def test_the_name_of_a_file_is_the_id(folder: Path, name: str) -> None:
    """One that cannot be an id is refused, and safe to show."""
    write(folder / f"{name}.key")
    with pytest.raises(KeyFileError, match="rename it to ID") as refused:
        read_keys(folder)
    assert str(refused.value).isprintable()


def test_other_files_are_left_alone(folder: Path) -> None:
    """Notes, drafts and hidden files beside the keys do not matter."""
    write(folder / "main.key")
    for name in ("README", ".main.key", "server.pem", ".holdoff-0123", "main.key~"):
        write(folder / name, b"?", 0o644)
    assert list(read_keys(folder)) == ["main"]


def test_a_directory_without_keys_says_how_to_make_one(folder: Path) -> None:
    """Fails when custody begins with keys that are not there."""
    with pytest.raises(KeyFileError, match=f"key generate --key-dir {folder}"):
        read_keys(folder)


# How they change


def test_a_mounted_secret_is_followed(tmp_path: Path) -> None:
    """As Kubernetes mounts and updates it: links to a directory that is replaced by another one."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    folder.chmod(0o3777)
    mode = 0o440 if US == 0 else 0o400

    def update(version: str, *ids: str) -> None:
        (folder / version).mkdir()
        for key_id in ids:
            write(folder / version / f"{key_id}.key", base64.b64encode(key_id[0].encode() * 32))
            (folder / version / f"{key_id}.key").chmod(mode)
        (folder / "..new").symlink_to(version)
        (folder / "..new").replace(folder / "..data")
        for key_id in ids:
            link = folder / f"{key_id}.key"
            if not link.is_symlink():
                link.symlink_to(f"..data/{key_id}.key")

    update("..1", "a")
    directory = KeyDirectory(folder)
    assert list(directory.keys()) == ["a"]
    update("..2", "a", "b")
    assert list(directory.keys()) == ["a", "b"]
    (folder / "a.key").unlink()
    update("..3", "b")
    assert list(directory.keys()) == ["b"]


def test_a_change_is_seen_and_a_wrong_one_changes_nothing(folder: Path) -> None:
    """The log tells once what is wrong, and when it is right again; it never tells a key.

    Fails when a key that is in use vanishes because another file is wrong.
    """
    main = create_key(folder, "main")
    directory = KeyDirectory(folder)
    with structlog.testing.capture_logs() as lines:
        assert directory.keys() == {"main": main}
        assert not lines
        new = create_key(folder, "new")
        assert directory.keys() == {"main": main, "new": new}
        write(folder / "bad.key", b"?")
        for _ in range(3):
            assert directory.keys() == {"main": main, "new": new}
        assert "bad.key is not a key" in directory.problem
        (folder / "bad.key").unlink()
        (folder / "main.key").unlink()
        assert directory.keys() == {"new": new}
    assert not directory.problem
    assert [line["log_level"] for line in lines] == ["info", "error", "info"]
    assert [line.get("keys") for line in lines] == [["main", "new"], None, ["new"]]


def test_a_directory_that_is_gone_keeps_its_keys(folder: Path) -> None:
    """Fails when a volume that is unmounted for a moment stops every refresh."""
    main = create_key(folder, "main")
    directory = KeyDirectory(folder)
    folder.rename(folder.with_name("moved"))
    assert directory.keys() == {"main": main}
    assert "No such file" in directory.problem
    folder.with_name("moved").rename(folder)
    assert directory.keys() == {"main": main}
    assert not directory.problem


def test_an_id_keeps_its_key(folder: Path) -> None:
    """Fails when a file with another key replaces one that is in use: nothing could be opened."""
    main = create_key(folder, "main")
    directory = KeyDirectory(folder)
    raw = (folder / "main.key").read_bytes()
    write(folder / "main.key")
    assert directory.keys() == {"main": main}
    assert "another key than before" in directory.problem
    write(folder / "main.key", raw + b"# moved to another disk\n")
    assert directory.keys()["main"].secret == main.secret
    assert not directory.problem


# The commands


def key_command(*arguments: str, **variables: str) -> Result:
    """Run `holdoff-coordinator key …`, which never shows a key."""
    done = coordinator_command("key", *arguments, **variables)
    folder = Path(variables.get("HOLDOFF_CUSTODY_KEY_DIR") or arguments[-1])
    for path in folder.glob("*.key") if folder.is_dir() else ():
        assert path.read_text().split()[-1] not in done.output
    return done


def test_generate_prints_the_id_only(tmp_path: Path) -> None:
    """Into a directory that it makes; and refuses to overwrite."""
    folder = str(tmp_path / "keys")
    done = key_command("generate", "main", "--key-dir", folder)
    assert (done.exit_code, done.output) == (0, "main\n")
    again = key_command("generate", "main", "--key-dir", folder)
    assert (again.exit_code, again.stdout) == (64, "")
    assert "exists, and is not overwritten" in again.stderr


def test_an_id_by_default_says_when(folder: Path) -> None:
    """Fails when the id of a key that was made without one cannot be an id."""
    done = key_command("generate", HOLDOFF_CUSTODY_KEY_DIR=str(folder))
    assert done.exit_code == 0
    key = read_keys(folder)[done.stdout.strip()]
    assert key.id.replace("-", "T") == key.created.replace("-", "").replace(":", "").strip("Z")


@pytest.mark.parametrize("key_id", ["Main", "a/b", "../a", "", "x" * 64, "\x1b[2J", "a\n"])
def test_an_id_that_cannot_be_is_refused(folder: Path, key_id: str) -> None:
    """Fails when a file is written somewhere else, or under a name that is never read."""
    done = key_command("generate", key_id, "--key-dir", str(folder))
    assert done.exit_code == 64
    assert "1 to 63 of a-z, 0-9 and -" in done.stderr
    assert not list(folder.iterdir())


def test_list_shows_what_is_wrong(folder: Path) -> None:
    """For people and as JSON, in one order, without a key."""
    main = create_key(folder, "main")
    write(folder / "open.key", mode=0o644)
    write(folder / "\x1b[2J.key")
    done = key_command("list", "--output", "json", "--key-dir", str(folder))
    assert done.exit_code == 0
    hostile, first, second = json.loads(done.stdout)["keys"]
    assert first == {"id": "main", "create_time": main.created, "check": main.check, "problem": ""}
    assert (second["id"], second["check"]) == ("open", "")
    assert "chmod 600" in second["problem"]
    assert "rename" in hostile["problem"]
    table = key_command("list", "--key-dir", str(folder)).stdout
    assert "\x1b" not in table
    lines = table.splitlines()
    assert lines[0].split() == ["ID", "CREATED", "CHECK", "PROBLEM"]
    assert lines[2].split() == ["main", main.created, main.check]


def test_rotate_makes_a_key_and_says_what_to_do(folder: Path) -> None:
    """Its standard output is the id, for scripts."""
    create_key(folder, "old")
    done = key_command("rotate", "new", "--key-dir", str(folder))
    assert (done.exit_code, done.stdout) == (0, "new\n")
    assert set(read_keys(folder)) == {"old", "new"}
    assert "every replica" in done.stderr


@pytest.mark.parametrize("command", ["generate", "list", "rotate"])
def test_a_command_needs_a_directory(tmp_path: Path, command: str) -> None:
    """Fails with a traceback, or with a key in a directory that no coordinator reads."""
    assert key_command(command).exit_code == 64
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "no" / "parent"):
        done = key_command(command, "--key-dir", str(path))
        assert done.exit_code == 64
        assert str(path) in done.stderr


def test_a_coordinator_does_not_start_without_its_keys(folder: Path) -> None:
    """Exit code 64, with the file and what to do. Fails when custody is off without a word."""
    data_dir = str(folder.with_name("data"))

    def refused(*options: str, **variables: str) -> str:
        done = coordinator_command("serve", "--data-dir", data_dir, *options, **variables)
        assert done.exit_code == 64
        return done.stderr

    assert "cannot read /nowhere" in refused("--custody-key-dir", "/nowhere")
    assert "key generate --key-dir" in refused("--custody-key-dir", str(folder))
    write(folder / "main.key", mode=0o644)
    assert "chmod 600" in refused(HOLDOFF_CUSTODY_KEY_DIR=str(folder))
