"One sound call for each public name of data.places and data.sources; the laws start from them"

from foundation.data import places, sources

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
    "data.places.Place": lambda: (
        places.Place,
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
    "data.places.short_path": lambda: (places.short_path, dict(path="/usr/share")),
    "data.sources.matches_hash": lambda: (
        sources.matches_hash,
        dict(path=scratch("a", b"1"), file=sources.File("a", ("0" * 64,))),
    ),
    "data.places.folder": lambda: (places.folder, dict(path=scratch(), hint="mkdir")),
    "data.places.installed": lambda: (
        places.installed,
        dict(package="sklearn", inside="datasets/data"),
    ),
    "data.places.apt_archive": lambda: (places.apt_archive, dict(package="wordnet-base")),
    "data.places.wheel_archive": lambda: (places.wheel_archive, dict(requirement="tiny==1.0")),
    "data.places.pip_archive": lambda: (places.pip_archive, dict(requirement="tiny==1.0")),
    "data.places.npm_archive": lambda: (places.npm_archive, dict(package="tiny@1.0.0")),
    "data.places.web": lambda: (places.web, ("https://example.org/a.txt",), {}),
    "data.places.limited": lambda: (places.limited, dict(most=1e6, seconds=3.0)),
    "data.places.within": lambda: (places.within, dict(size=10)),
    "data.places.contents": lambda: (places.contents, dict(folder=scratch(), most=1000)),
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
