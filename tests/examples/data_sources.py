"One sound call for each public name of data.downloads and data.sources; the laws start from them"

from foundation.data import downloads, sources

from .core import scratch


def tiny(*places):
    return sources.Source(
        "tiny",
        "two words",
        "none",
        "a desk",
        0.01,
        {"text": sources.File("a.txt", ("0" * 64,))},
        places,
    )


EXAMPLES = {
    "data.sources.File": lambda: (sources.File, dict(name="a.txt", sha256=("0" * 64,))),
    "data.downloads.Place": lambda: (
        downloads.Place,
        dict(label="a desk", get=lambda scratch: scratch, online=False),
    ),
    "data.sources.Source": lambda: (
        sources.Source,
        dict(
            name="tiny",
            description="two words",
            licence="none",
            home="a desk",
            mb=0.01,
            files={},
            places=(),
        ),
    ),
    "data.sources.DataUnavailable": lambda: (sources.DataUnavailable, ("it cannot be had",), {}),
    "data.sources.cache_folder": lambda: (sources.cache_folder, {}),
    "data.downloads.short_path": lambda: (downloads.short_path, dict(path="/usr/share")),
    "data.sources.matches_hash": lambda: (
        sources.matches_hash,
        dict(path=scratch("a", b"1"), file=sources.File("a", ("0" * 64,))),
    ),
    "data.downloads.folder": lambda: (downloads.folder, dict(path=scratch(), hint="mkdir")),
    "data.downloads.installed": lambda: (
        downloads.installed,
        dict(package="sklearn", inside="datasets/data"),
    ),
    "data.downloads.apt_archive": lambda: (downloads.apt_archive, dict(package="wordnet-base")),
    "data.downloads.wheel_archive": lambda: (
        downloads.wheel_archive,
        dict(requirement="tiny==1.0"),
    ),
    "data.downloads.pip_archive": lambda: (downloads.pip_archive, dict(requirement="tiny==1.0")),
    "data.downloads.npm_archive": lambda: (downloads.npm_archive, dict(package="tiny@1.0.0")),
    "data.downloads.web": lambda: (downloads.web, ("https://example.org/a.txt",), {}),
    "data.downloads.limited": lambda: (downloads.limited, dict(most=1e6, seconds=3.0)),
    "data.downloads.within": lambda: (downloads.within, dict(size=10)),
    "data.downloads.contents": lambda: (downloads.contents, dict(folder=scratch(), most=1000)),
    "data.sources.fetch": lambda: (sources.fetch, dict(source="digits", cache=None)),
    "data.sources.Status": lambda: (
        sources.Status,
        dict(name="tiny", ready=True, note="", place="", folder=scratch()),
    ),
    "data.sources.where": lambda: (sources.where, dict(source=tiny(), cache=scratch())),
}
SKIP = {
    "data.sources.SOURCES": "a constant",
}
