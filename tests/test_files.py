"What a notebook cannot say about foundation.core.files: power cuts, links, modes, killed processes"

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from foundation.core import files
from foundation.core.files import atomic_write, locked, size_mb, sync_folder

POSIX = pytest.mark.skipif(os.name == "nt", reason="no such files there")


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done = []

    def fsync(handle):
        what = os.fstat(handle)
        done.append("folder" if stat.S_ISDIR(what.st_mode) else f"file of {what.st_size}")

    replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("renamed"), replace(*a)))
    write(tmp_path / "a", b"12345")
    assert done == ["file of 5", "renamed"] + ["folder"] * (os.name != "nt")
    done.clear()
    write(
        tmp_path / "x" / "y" / "b", b"1"
    )  # the names of the two new folders are put on the disk too
    assert done == ["folder"] * 2 * (os.name != "nt") + ["file of 1", "renamed"] + ["folder"] * (
        os.name != "nt"
    )


def test_windows_opens_no_folder(tmp_path, monkeypatch):
    opened, really = [], os.open
    monkeypatch.setattr(
        os, "open", lambda path, *a, **k: (opened.append(Path(path)), really(path, *a, **k))[1]
    )
    monkeypatch.setattr(
        files, "os", types.SimpleNamespace(**{k: getattr(os, k) for k in dir(os)} | {"name": "nt"})
    )
    write(tmp_path / "a")
    assert tmp_path not in opened and (tmp_path / "a").read_bytes() == b"new"


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EINVAL, "no"))
    )
    sync_folder(tmp_path)
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk"))
    )
    if os.name != "nt":
        with pytest.raises(OSError, match="broken disk"):
            sync_folder(tmp_path)


@POSIX
def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/real")
    (tmp_path / "again").symlink_to("link")
    write(tmp_path / "again")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "again").is_symlink()
    assert (tmp_path / "far" / "real").read_bytes() == b"new" and len(
        list((tmp_path / "far").iterdir())
    ) == 1
    (tmp_path / "hanging").symlink_to("far/not_yet/there")
    write(tmp_path / "hanging")
    assert (tmp_path / "far" / "not_yet" / "there").read_bytes() == b"new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="leads back to itself"):
        write(tmp_path / "loop")


@POSIX
@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664, 0o444, 0o755])
def test_a_file_keeps_its_mode_and_its_draft_was_never_more_open(tmp_path, monkeypatch, mode):
    write(tmp_path / "a")
    os.chmod(tmp_path / "a", mode)
    with atomic_write(tmp_path / "a") as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~mode == 0
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


@POSIX
def test_a_new_file_gets_what_the_umask_leaves_and_no_thread_sees_another_umask(
    tmp_path, monkeypatch
):
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                os, "umask", lambda mask: pytest.fail("the mask belongs to the whole process")
            )
            write(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "name", ["x" * 240, "x" * 255, "é" * 120, "長" * 80, "🙂" * 60, ".hidden", "a b", "-"]
)
def test_long_and_odd_names_work(tmp_path, name):
    for content in (b"one", b"two"):
        write(tmp_path / name, content)
    assert (tmp_path / name).read_bytes() == b"two" and [p.name for p in tmp_path.iterdir()] == [
        name
    ]


def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    for place, words in [
        (tmp_path / "folder", "is a folder"),
        ("", "is a folder"),
        (tmp_path / "file" / "in" / "it", "is a file"),
    ]:
        with pytest.raises(OSError, match=words):
            write(place)
    with pytest.raises(ValueError, match="mode is 'r'; expected one of"):
        with atomic_write(tmp_path / "a", "r"):
            pass
    with pytest.raises(TypeError, match="path is None; expected a path or a string"):
        with atomic_write(None):
            pass
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        for place in (tmp_path / "pipe", "/dev/null"):
            with pytest.raises(OSError, match="a device or a pipe"):
                write(place)
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert {p.name for p in tmp_path.iterdir()} <= {"folder", "file", "pipe"} and (
        tmp_path / "file"
    ).read_bytes() == b"old"


def test_an_error_in_the_block_leaves_the_old_file_and_no_litter(tmp_path):
    write(tmp_path / "a", b"old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            with atomic_write(tmp_path / "a") as file:
                file.write(b"half")
                raise error
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_many_writers_leave_one_whole_file(tmp_path):
    threads = [
        threading.Thread(target=write, args=(tmp_path / "a", bytes([65 + i]) * 100_000))
        for i in range(8)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    content = (tmp_path / "a").read_bytes()
    assert len(content) == 100_000 and len(set(content)) == 1 and len(list(tmp_path.iterdir())) == 1


def test_text_is_utf_8_with_plain_line_ends_everywhere(tmp_path):
    with atomic_write(str(tmp_path / "a"), "w") as file:
        file.write("ä\n🙂\n")
    assert (tmp_path / "a").read_bytes() == "ä\n🙂\n".encode() and size_mb(tmp_path / "a") == 8e-6
    with pytest.raises(FileNotFoundError, match="there is no file"):
        size_mb(tmp_path / "b")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        sync_folder("not/there")


# Locks ----------------------------------------------------------------------------------------


def test_a_lock_keeps_others_out_and_is_given_back(tmp_path):
    with locked(tmp_path / "new" / "lock"):
        with pytest.raises(TimeoutError, match="lock has been held for 0 s"):
            with locked(str(tmp_path / "new" / "lock"), patience=0.2):
                pass
    with locked(tmp_path / "new" / "lock") as is_there:
        assert is_there()
    assert (tmp_path / "new" / "lock").exists()


def test_a_lock_whose_file_was_removed_is_no_longer_there(tmp_path):
    with locked(tmp_path / "a" / "lock") as is_there:
        assert is_there()
        (tmp_path / "a" / "lock").unlink()
        assert not is_there()
        with locked(tmp_path / "a" / "lock") as other:
            assert other() and not is_there()


def test_an_error_in_the_block_gives_the_lock_back(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            with locked(tmp_path / "lock"):
                raise error
    with locked(tmp_path / "lock"):
        pass


HOLD = """
import sys, time
from foundation.core.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(path, seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_holds_nothing(tmp_path):
    process = hold(tmp_path / "lock", 60)
    with pytest.raises(TimeoutError):
        with locked(tmp_path / "lock"):
            pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(tmp_path / "lock", patience=5):
        pass


def test_who_waits_longer_than_a_second_says_so_once(tmp_path, capsys):
    process = hold(tmp_path / "lock", 1.5)
    with locked(tmp_path / "lock", patience=20, notice="waiting for it"):
        assert capsys.readouterr().err == "waiting for it\n"
    process.communicate()
    with locked(tmp_path / "lock", patience=20, notice="waiting for it"):
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_lets_all_in(tmp_path, monkeypatch, kind):
    def refuse(self, *args, **options):
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with locked(tmp_path / "lock") as is_there:
        assert is_there()


def test_other_errors_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        with locked(tmp_path / "file" / "lock"):
            pass
    with pytest.raises(TypeError, match="path is 3; expected a path or a string"):
        with locked(3):
            pass
    for patience in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="patience is .*; expected a number from 0"):
            with locked(tmp_path / "lock", patience=patience):
                pass


def test_importing_files_is_light():
    code = "import sys, foundation.core.files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


@POSIX
def test_only_a_shared_lock_is_open_to_others(tmp_path):
    before = os.umask(0o022)
    try:
        for shared, mode in ((False, 0o644), (True, 0o666)):
            with locked(tmp_path / str(shared), shared=shared):
                pass
            assert stat.S_IMODE((tmp_path / str(shared)).stat().st_mode) == mode
    finally:
        os.umask(before)
