"""One sound call for each public name of foundation.data.sources;
the laws and the fuzz start from them"""

from foundation.data import sources

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
    "data.sources.Place": lambda: (
        sources.Place,
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
    "data.sources.short_path": lambda: (sources.short_path, dict(path="/usr/share")),
    "data.sources.matches_hash": lambda: (
        sources.matches_hash,
        dict(path=scratch("a", b"1"), file=sources.File("a", ("0" * 64,))),
    ),
    "data.sources.folder": lambda: (sources.folder, dict(path=scratch(), hint="mkdir")),
    "data.sources.installed": lambda: (
        sources.installed,
        dict(package="sklearn", inside="datasets/data"),
    ),
    "data.sources.apt_archive": lambda: (sources.apt_archive, dict(package="wordnet-base")),
    "data.sources.wheel_archive": lambda: (sources.wheel_archive, dict(requirement="tiny==1.0")),
    "data.sources.pip_archive": lambda: (sources.pip_archive, dict(requirement="tiny==1.0")),
    "data.sources.npm_archive": lambda: (sources.npm_archive, dict(package="tiny@1.0.0")),
    "data.sources.web": lambda: (sources.web, ("https://example.org/a.txt",), {}),
    "data.sources.alone": lambda: (
        sources.alone,
        dict(path=scratch("lock"), task="a task", patience=1.0),
    ),
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
