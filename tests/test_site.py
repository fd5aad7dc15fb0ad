"README.md and the site are made from what is there; the site is whole and needs no network"

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import notebooks
import pytest
import vendor

ROOT = notebooks.ROOT
PAGES = {p.relative_to(ROOT / "nbs").with_suffix("").as_posix(): p for p in notebooks.lessons()}
needs_sphinx = pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="Sphinx 9 needs Python 3.11 or newer"
)


# README.md ----------------------------------------------------------------------------------------


def test_readme_is_up_to_date():
    import readme

    assert sorted(readme.stale()) == []


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r'(?:\]\(|src=")(?!https?:|#|data:)([^)"#\s]+)', text)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
    assert "data:image" not in text and not re.search(r'<img (?![^>]*alt="[^"]+)', text)


def test_pictures_of_the_readme_become_files_with_their_alt_text():
    import readme

    pictures = {}
    html = (
        '<div><img alt="a curve" width="3"'
        ' src="data:image/png;base64,aGVsbG8="></div><script>alert(1)</script>'
    )
    shown = readme.shown(
        dict(output_type="display_data", data={"text/html": [html]}), pictures, "images"
    )
    assert shown == '<div><img alt="a curve" width="3" src="images/readme-0.png"></div>'
    assert pictures == {"images/readme-0.png": b"hello"}
    assert readme.below("nbs", shown).count("nbs/images/readme-0.png") == 1
    assert (
        readme.below("nbs", "[a](01_x/y.ipynb) [b](https://x.org) [c](#d)")
        == "[a](nbs/01_x/y.ipynb) [b](https://x.org) [c](#d)"
    )


# Portable Markdown --------------------------------------------------------------------------------


def test_call_outs_become_those_of_quarto():
    import portable

    cell = SimpleNamespace(
        cell_type="markdown",
        source=(
            "> **Key idea:** one\n> two\n\n> **Note:** three\n\n>"
            " plain\n\n```mermaid\nA\n```\n[x](a.ipynb#Big)"
        ),
    )
    portable.to_quarto(cell)
    assert (
        '::: {.callout-note title="Key idea"}\none\ntwo\n:::' in cell.source
        and "::: {.callout-note}\nthree\n:::" in cell.source
    )
    assert (
        "> plain" in cell.source and "```{mermaid}" in cell.source and "a.ipynb#big" in cell.source
    )


def test_the_table_of_parameters_survives_a_pipe():
    import portable

    def fn(x: "int | None" = None, y=3) -> "torch.Tensor":  # a number | or none  # the result
        "Docs"

    rows = portable.parameters(fn).splitlines()
    assert len(rows) == 5 and all(row.count("|") == 5 for row in rows[2:])
    assert (
        "<code>int &#124; None</code>" in rows[2]
        and "<code>3</code>" in rows[3]
        and "<code>Tensor</code>" in rows[4]
    )
    assert portable.parameters(len) == "" and portable.parameters(lambda x: x) == ""


@needs_sphinx
def test_each_definition_gets_its_own_heading():
    import nb2myst

    source = (
        "import x\n\ndef a():\n    return 1\n\nY = 2\n\n@patch\ndef b(self:A):\n    return 2\n\nZ"
        " = 3\n"
    )
    parts = nb2myst.pieces(source, {"a", "A.b"})
    assert [name for name, _ in parts] == ["a", "A.b"]
    assert (
        parts[0][1].endswith("return 1")
        and parts[1][1].startswith("Y = 2")
        and parts[1][1].endswith("Z = 3")
    )


# Scripts from elsewhere ---------------------------------------------------------------------------


def test_scripts_have_a_stamp_and_a_fallback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vendor, "PLACE", tmp_path / "vendor")
    monkeypatch.setattr(vendor, "STAMP", tmp_path / "vendor/versions.json")
    monkeypatch.setattr(vendor.shutil, "which", lambda name: None)
    vendor.main()
    assert "CDN" in capsys.readouterr().err and not vendor.ready()
    monkeypatch.setattr(vendor.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(
        vendor, "unpack", lambda *args: (_ for _ in ()).throw(OSError("no network"))
    )
    vendor.main()
    assert "no network" in capsys.readouterr().err and not vendor.ready()
    monkeypatch.setattr(vendor, "unpack", lambda folder, package, *rest: package.encode())
    vendor.main()
    assert "another content" in capsys.readouterr().err and not vendor.ready()
    assert vendor.attributes("tex-svg.js")["integrity"].startswith("sha384-")
    monkeypatch.setattr(vendor, "intact", lambda content, digest: True)
    vendor.main()
    assert (
        vendor.attributes("tex-svg.js") == {}
    )  # the copy beside the site was looked at when it was fetched
    assert vendor.ready() and (tmp_path / "vendor/tex-svg.js").read_bytes() == b"mathjax"
    vendor.STAMP.write_text("{half a stamp")
    assert not vendor.ready()


# The site -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    "What a page refers to"

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.bare = [], [], set(), []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.ids.add(a.get("id"))
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if (
            tag in ("script", "img", "iframe")
            and a.get("src")
            or tag == "link"
            and a.get("rel") in ("stylesheet", "preload")
        ):
            self.loads.append(a.get("src") or a["href"])
        if tag == "img" and not a.get("alt"):
            self.bare.append(a.get("src", "")[:80])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    import build

    out = tmp_path_factory.mktemp("site")
    assert build.build(out / "html", out / "doctrees") == 0, (
        "sphinx -W failed: its words stand above"
    )
    return out / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {name: Page(site / f"{name}.html") for name in PAGES}


@needs_sphinx
def test_each_lesson_is_a_page_that_can_be_searched(site, pages):
    assert [
        name
        for name, path in PAGES.items()
        if notebooks.title(path)[0].split("`")[0] not in pages[name].text
    ] == []
    index = json.loads(
        re.search(r"setIndex\((.*)\)", (site / "searchindex.js").read_text(encoding="utf-8"), re.S)[
            1
        ]
    )
    assert set(PAGES) <= set(index["docnames"])


@needs_sphinx
def test_each_page_has_its_way_on_its_colab_button_and_dark_mode(pages):
    lessons = [name for name in PAGES if name != "index"]
    assert [
        n
        for n in lessons
        if f"/blob/{notebooks.settings()['branch']}/nbs/{n}.ipynb" not in pages[n].text
        or "colab.research.google.com" not in pages[n].text
    ] == []
    assert [n for n in lessons[1:-1] if "prev-next-area" not in pages[n].text] == []
    assert [n for n in PAGES if "theme-switch" not in pages[n].text] == []


@needs_sphinx
def test_nothing_comes_from_elsewhere_when_the_scripts_are_vendored(pages):
    loads = {
        load
        for page in pages.values()
        for load in page.loads
        if load.startswith(("http:", "https:", "//"))
    }
    assert loads <= ({vendor.cdn(name) for name in vendor.SCRIPTS} if not vendor.ready() else set())
    assert not any("widget-view" in page.text for page in pages.values())


@needs_sphinx
def test_scripts_from_elsewhere_are_sealed_and_new_tabs_get_no_hold_on_ours(pages):
    for name, page in pages.items():
        for tag in re.findall(r"<script[^>]*src=.https?:[^>]*>", page.text):
            assert "integrity" in tag and "crossorigin" in tag, f"{name}: {tag}"
        loose = [
            a for a in re.findall(r"<a [^>]*>", page.text) if "_blank" in a and "rel=" not in a
        ]
        assert not loose, f"{name}: {loose[0]}"


@needs_sphinx
def test_pictures_have_words(pages):
    assert {name: page.bare for name, page in pages.items() if page.bare} == {}


@needs_sphinx
def test_links_within_the_site_arrive(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:|//", link):
                continue
            path = (site / name).parent / target if target else site / f"{name}.html"
            other = pages.get(path.resolve().relative_to(site.resolve()).with_suffix("").as_posix())
            if not path.exists() or anchor and other and anchor not in other.ids:
                dead.append((name, link))
    assert dead == []


@needs_sphinx
def test_names_lead_to_their_source(pages):
    links = [
        link
        for page in pages.values()
        for link in page.links
        if "/foundation/" in link and "#L" in link
    ]
    assert links
    for link in links:
        path, line = re.search(r"/blob/[^/]+/(foundation/.*\.py)#L(\d+)$", link).groups()
        assert re.match(
            r"\s*(def|class|async def|@)", (ROOT / path).read_text().splitlines()[int(line) - 1]
        ), link


# Quarto -------------------------------------------------------------------------------------------


def test_nbdev_can_prepare_the_notebooks_for_quarto(tmp_path):
    "`nbdev_docs` needs Quarto; all that comes before Quarto runs here"
    lesson = [path for path in notebooks.lessons() if path.parent.name == "01_objectives"][0]
    for path in [ROOT / "settings.ini", lesson]:
        place = tmp_path / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    code = (
        "import nbdev.serve, nbdev.quarto; nbdev.quarto.refresh_quarto_yml();"
        " print(nbdev.serve.proc_nbs(n_workers=0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "_proc" / lesson.relative_to(ROOT / "nbs")).read_text()
    assert (
        "title: " in text and "colab-badge" not in text and "<code>" in text and "show_doc" in text
    )


def test_what_leads_in_an_unseen_cell_is_not_shown_without_it():
    import nb2myst

    def cell(kind, text):
        return dict(cell_type=kind, source=text, metadata={})

    glue, shown = cell("code", "#| export\ndef f(): ..."), cell("code", "#| exports\ndef g(): ...")
    lead, two = cell("markdown", "The helper:"), cell("markdown", "## Parts\n\nThe helper:")
    told = cell("markdown", "Nothing is lost.")
    assert nb2myst.without_lead_ins([lead, glue, told]) == [glue, told]
    assert nb2myst.without_lead_ins([lead, shown]) == [lead, shown]
    assert nb2myst.without_lead_ins([told, glue]) == [told, glue]
    assert [c["source"] for c in nb2myst.without_lead_ins([two, glue])][0] == "## Parts"
