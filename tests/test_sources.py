"What a notebook cannot say about foundation.core.sources: killed processes, full disks, closed folders, no network."
import errno
import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from foundation.core import sources
from foundation.core.sources import SOURCES, DataUnavailable, File, Place, Source, cache_folder, fetch, folder, installed, web, where

TEXT = b"one small line\n"
SUM = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    for name in ("FOUNDATION_DATA", "FOUNDATION_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FOUNDATION_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def shelf(tmp_path, content=TEXT, name="line.txt"):
    place = tmp_path / "shelf"
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(content)
    return folder(place)


def tiny(*places, mb=0.1, name="tiny"):
    return Source(name, "one line of text", "public domain", "the library", mb, {"line": File("line.txt", (SUM,))}, places)


def broken(error, online=False):
    def get(scratch):
        raise error
    return Place("the broken place", get, online)


# Order, content ---------------------------------------------------------------------------------------------------------

def test_first_place_that_delivers_wins_and_is_remembered(tmp_path, own_cache):
    source = tiny(broken(RuntimeError("no luck")), shelf(tmp_path), broken(AssertionError("must not be asked")))
    path = fetch(source)["line"]
    assert path == own_cache / "tiny" / "line.txt" and path.read_bytes() == TEXT
    assert where(source).ready and "shelf" in where(source).place


def test_second_call_asks_no_place(tmp_path):
    fetch(tiny(shelf(tmp_path)))
    assert fetch(tiny(broken(AssertionError("asked"))))["line"].read_bytes() == TEXT


@pytest.mark.parametrize("parcel", ["line.txt.gz", "all.tar.gz", "all.zip", "nested.tgz"])
def test_any_parcel_with_the_right_content_is_good(tmp_path, parcel):
    import zipfile
    place = tmp_path / "shelf"
    place.mkdir()
    if parcel.endswith("zip"):
        with zipfile.ZipFile(place / parcel, "w") as archive:
            archive.writestr("deep/inside/line.txt", TEXT)
    elif parcel.startswith("line"):
        (place / parcel).write_bytes(gzip.compress(TEXT))
    else:
        data, inner = TEXT, "a/line.txt"
        for level in range(2 if parcel.startswith("nested") else 1):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
                info = tarfile.TarInfo(inner)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            data, inner = buffer.getvalue(), "b/inner.tar.gz"
        (place / parcel).write_bytes(data)
    assert fetch(tiny(folder(place)))["line"].read_bytes() == TEXT


def test_archive_paths_cannot_escape(tmp_path, own_cache):
    place = tmp_path / "shelf"
    place.mkdir()
    with tarfile.open(place / "evil.tar", "w") as archive:
        for name in ("../../../line.txt", "/etc/evil"):
            info = tarfile.TarInfo(name)
            info.size = len(TEXT)
            archive.addfile(info, io.BytesIO(TEXT))
        link = tarfile.TarInfo("other.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    fetch(tiny(folder(place)))
    assert {p.name for p in own_cache.rglob("*") if p.is_file()} == {".tiny.lock", "line.txt", "origin.json"}
    assert not (tmp_path / "line.txt").exists()


def test_damaged_archive_and_wrong_content_are_passed_over(tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "all.tar.gz").write_bytes(gzip.compress(b"x" * 5000)[:20])
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "line.txt").write_bytes(b"another line\n")
    assert fetch(tiny(folder(bad), folder(wrong), shelf(tmp_path)))["line"].read_bytes() == TEXT


def test_every_good_edition_is_accepted(tmp_path):
    other = b"another edition\n"
    both = File("line.txt", (SUM, hashlib.sha256(other).hexdigest()))
    source = Source("tiny", "", "", "", 0.1, {"line": both}, (shelf(tmp_path, other),))
    assert fetch(source)["line"].read_bytes() == other


@pytest.mark.parametrize("damage", [b"", TEXT[:-3], TEXT.replace(b"small", b"SMALL")])
def test_damaged_cache_is_noticed_said_and_mended(tmp_path, own_cache, capsys, damage):
    source = tiny(shelf(tmp_path))
    path = fetch(source)["line"]
    path.write_bytes(damage)
    assert where(source).note == "damaged: line.txt" and not where(source).ready
    assert fetch(source)["line"].read_bytes() == TEXT
    assert capsys.readouterr().err == "tiny: line.txt in the cache is damaged; getting it anew.\n"


def test_files_put_into_the_cache_by_hand_count(own_cache):
    (own_cache / "tiny").mkdir(parents=True)
    (own_cache / "tiny" / "line.txt.gz").write_bytes(gzip.compress(TEXT))
    assert fetch(tiny(broken(OSError("closed"))))["line"].read_bytes() == TEXT


def test_missing_origin_does_not_matter(tmp_path, own_cache):
    source = tiny(shelf(tmp_path))
    fetch(source)
    (own_cache / "tiny" / "origin.json").write_text("[half a fi")
    assert where(source).ready and where(source).place == ""


# Trouble ----------------------------------------------------------------------------------------------------------------

def test_message_names_each_place_its_reason_and_the_way_by_hand(tmp_path):
    source = tiny(folder(tmp_path / "nowhere", "apt install tiny"), broken(OSError("the server said no")), installed("no_such_package"))
    with pytest.raises(DataUnavailable) as caught:
        fetch(source)
    told = str(caught.value)
    for word in ("'tiny'", "apt install tiny", "the broken place: the server said no", "no_such_package: is not installed", "By hand",
                 "line.txt", "the library", "FOUNDATION_DATA"):
        assert word in told


def test_offline_asks_only_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("FOUNDATION_OFFLINE", "1")
    with pytest.raises(DataUnavailable, match="the broken place: not asked, because FOUNDATION_OFFLINE is set"):
        fetch(tiny(broken(AssertionError("asked"), online=True)))
    assert fetch(tiny(broken(AssertionError("asked"), online=True), shelf(tmp_path)))["line"].exists()
    monkeypatch.setenv("FOUNDATION_OFFLINE", "0")
    with pytest.raises(DataUnavailable, match="reached"):
        fetch(tiny(broken(OSError("reached"), online=True), name="other"))


def test_no_network_is_a_reason_and_no_crash(tmp_path):
    with pytest.raises(DataUnavailable, match="refused|No such file"):
        fetch(tiny(web("http://127.0.0.1:9/line.txt"), web((tmp_path / "none.txt").as_uri())))


def test_web_place_downloads(tmp_path):
    shelf(tmp_path, gzip.compress(TEXT), "line.txt.gz")
    assert fetch(tiny(web((tmp_path / "shelf" / "line.txt.gz").as_uri())))["line"].read_bytes() == TEXT


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no data set 'fashion'; there are: fashion_mnist, digits, glosses, reviews"):
        fetch("fashion")


def test_full_disk_is_one_sentence(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"),):
        with pytest.raises(DataUnavailable, match="^The disk is full: tiny needs about 10 MB .* FOUNDATION_DATA") as caught:
            fetch(tiny(broken(error), shelf(tmp_path)))
        assert "\n" not in str(caught.value) and caught.value.__suppress_context__


def test_too_little_room_is_noticed_before_fetching(tmp_path):
    with pytest.raises(DataUnavailable, match="The disk is full"):
        fetch(tiny(broken(AssertionError("asked")), mb=1e9))


def test_closed_home_falls_back_to_a_temporary_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "home").write_text("a file where a folder should be")  # closed to root as well
    monkeypatch.delenv("FOUNDATION_DATA")
    monkeypatch.setattr(sources, "cache_folder", lambda: tmp_path / "home" / "foundation")
    monkeypatch.setattr(sources, "_spare_folder", lambda: tmp_path / "spare")
    source = tiny(shelf(tmp_path))
    assert fetch(source)["line"] == tmp_path / "spare" / "tiny" / "line.txt"
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Nothing can be written to" in told and "FOUNDATION_DATA" in told
    assert fetch(source)["line"].exists() and where(source).ready and capsys.readouterr().err == ""


def test_closed_folder_that_was_asked_for_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOUNDATION_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(DataUnavailable, match="Nothing can be written to .*: set FOUNDATION_DATA"):
        fetch(tiny(shelf(tmp_path)))


def test_a_filled_cache_needs_no_writing(tmp_path, own_cache, monkeypatch):
    fetch(tiny(shelf(tmp_path)))
    monkeypatch.setattr(sources, "_is_writable", lambda folder: pytest.fail("tried to write"))
    assert fetch(tiny())["line"].exists()


@pytest.mark.parametrize("platform, variables, tail", [
    ("linux", {}, ".cache/foundation"), ("linux", {"XDG_CACHE_HOME": "/x/y"}, "/x/y/foundation"),
    ("darwin", {}, "Library/Caches/foundation"), ("win32", {"LOCALAPPDATA": "C:/Local"}, "C:/Local/foundation")])
def test_cache_folder_of_each_system(monkeypatch, platform, variables, tail):
    monkeypatch.delenv("FOUNDATION_DATA")
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder().as_posix().endswith(tail)


# Processes --------------------------------------------------------------------------------------------------------------

SCRIPT = """
import hashlib, sys, time
from pathlib import Path
from foundation.core.sources import File, Place, Source, fetch
cache, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
text = b"one small line\\n"
def get(scratch):
    with open(log, "a") as file: file.write("asked\\n")
    (scratch / "line.txt").write_bytes(text[:5])
    time.sleep(seconds)
    (scratch / "line.txt").write_bytes(text)
    return scratch
source = Source("tiny", "", "", "", .1, {"line": File("line.txt", (hashlib.sha256(text).hexdigest(),))}, (Place("slow", get),))
print(fetch(source, cache)["line"].read_bytes() == text)
"""


def start(cache, log, seconds):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(cache), str(log), str(seconds)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_two_processes_fetch_once_and_the_waiting_one_says_so(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    first = start(cache, log, 3)
    wait_for(log.exists)
    second = start(cache, log, 3)
    (out, _), (out2, err2) = first.communicate(timeout=30), second.communicate(timeout=30)
    assert out == out2 == "True\n" and log.read_text() == "asked\n"
    assert err2 == "Another process is busy with tiny; waiting for it.\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_no_lock_and_its_scraps_are_cleared(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    first = start(cache, log, 60)
    wait_for(log.exists)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert list(cache.glob(".part-tiny-*")) and not (cache / "tiny" / "line.txt").exists()
    begin = time.monotonic()
    out, _ = start(cache, log, 0).communicate(timeout=30)
    assert out == "True\n" and time.monotonic() - begin < 10
    assert not list(cache.glob(".part-*")) and log.read_text() == "asked\n" * 2


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent another way there")
def test_an_interrupted_fetch_ends_its_tool_and_clears_up(tmp_path):
    script = ("import sys; from pathlib import Path; from foundation.core.sources import *; from foundation.core import sources\n"
              "def get(scratch):\n    sources._run(sys.executable, '-c', 'import os, time; open(\"pid\", \"w\").write(str(os.getpid())); "
              "time.sleep(60)', cwd=scratch)\n"
              f"fetch(Source('tiny', '', '', '', .1, {{'a': File('a', ('0',))}}, (Place('slow', get),)), Path({str(tmp_path)!r}))")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    tools = []

    def started():
        try:  # folders come and go while we look
            tools[:] = [p.read_text() for p in tmp_path.rglob("pid")]
        except FileNotFoundError:
            return False
        return any(tools)

    wait_for(started)
    tool = int(next(filter(None, tools)))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    wait_for(lambda: not Path(f"/proc/{tool}").exists() if Path("/proc").exists() else True)
    assert not list(tmp_path.glob(".part-*"))


def test_a_tool_that_fails_gives_its_own_reason(tmp_path):
    with pytest.raises(OSError, match="E: there is no such package"):
        sources._run(sys.executable, "-c", "print('Reading lists'); print('E: there is no such package'); exit(100)", cwd=tmp_path)
    with pytest.raises(FileNotFoundError, match="no-such-tool is not on this machine"):
        sources._run("no-such-tool", cwd=tmp_path)


# The real sets ----------------------------------------------------------------------------------------------------------

def test_sums_are_sums_and_places_end_on_the_web():
    for source in SOURCES.values():
        for file in source.files.values():
            assert file.sha256 and all(len(s) == 64 and set(s) <= set("0123456789abcdef") for s in file.sha256)
        assert source.places and source.licence and source.home.startswith("https://")


def test_digits_are_always_there(monkeypatch):
    monkeypatch.setenv("FOUNDATION_OFFLINE", "1")
    assert len(fetch("digits")["table"].read_text().split()) == 1797


def test_importing_sources_is_light():
    code = "import sys, foundation.core.sources; print([m for m in ('torch', 'numpy', 'sklearn', 'tqdm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
