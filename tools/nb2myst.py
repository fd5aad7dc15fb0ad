"""A Sphinx extension: each notebook goes through nbdev's own processors,
then Quarto's idioms become MyST's"""

import ast
import html
import json
import os
import posixpath
import re
import zlib
from functools import cache
from pathlib import Path

import notebooks
import vendor
from docutils import nodes
from execnb.nbio import NbCell, dict2nb, mk_cell, nb2str
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html, nbglob
from nbdev.processors import FilterDefaults
from nbdev.showdoc import showdoc_nm
from portable import ShowDocs, callouts, lower_anchors

OPTION = re.compile(r"^#\|\s*([\w-]+):\s*(.*?)\s*$\n?", re.M)
TAGS = {
    ("echo", "false"): "remove-input",
    ("output", "false"): "remove-output",
    ("include", "false"): "remove-cell",
    ("warning", "false"): "remove-stderr",
    ("code-fold", "true"): "hide-input",
}


def slug(title):
    "Anchors of headings as nbdev makes them: dots are kept"
    return re.sub(r"[^\w\-. ]", "", title.strip().lower()).replace(" ", "-")


class SphinxFilter(FilterDefaults):
    "nbdev's processors and `show_doc`; the rest of `procs` in settings.ini is for Quarto"

    def xtra_procs(self):
        return [ShowDocs]


def site_pages():
    "From the page that nbdev links to (`02_x/mlm.html`) to the notebook (`02_x/01_mlm.ipynb`)"
    nbs = get_config().nbs_path
    paths = [p.relative_to(nbs) for p in nbglob(nbs, as_path=True)]
    return {_nbpath2html(p).as_posix(): p.as_posix() for p in paths}


# Cells --------------------------------------------------------------------------------------------


def code_cell(cell):
    "Quarto's cell options become myst-nb's tags, the output of `show_doc` becomes a Markdown cell"
    options = {k: v.strip("\"'") for k, v in OPTION.findall(cell.source)}
    cell.source = OPTION.sub("", cell.source)
    cell.pop("has_sd", None)
    if cell.source.startswith("show_doc("):
        return documentation(cell)
    cell.metadata["tags"] = [tag for (k, v), tag in TAGS.items() if options.get(k) == v]
    look = {}
    if "code-summary" in options:
        look |= dict(
            code_prompt_show=options["code-summary"], code_prompt_hide=options["code-summary"]
        )
    if "fig-alt" in options:
        look["image"] = dict(alt=options["fig-alt"])
    if "fig-cap" in options:
        look["figure"] = dict(
            caption=options["fig-cap"], **({"name": options["label"]} if "label" in options else {})
        )
    if look:
        cell.metadata["mystnb"] = look


def documentation(cell):
    "A heading with the name in code style, then what `show_doc` said"
    said = next(
        (
            "".join(o["data"]["text/markdown"])
            for o in cell.outputs
            if "text/markdown" in o.get("data", {})
        ),
        "",
    )
    said = re.sub(r"^---\n", "", said)
    cell.cell_type = "markdown"
    cell.source = re.sub(r"^(#+ )(.*)$", r"\1`\2`", said, count=1, flags=re.M)
    said, table = re.split(r"(?=^\| \| Type )|\Z", cell.source, maxsplit=1, flags=re.M)
    if (
        cell.get("part") == "head"
    ):  # above its own source a name needs no signature: the code says it
        cell.source = "\n\n".join(re.findall(r"^(?:<a class|#+ ).*$", said, re.M))
    elif cell.get("part") == "table":
        cell.source = (
            f"::::{{dropdown}} Parameters\n:class-container: parameters\n{table.strip()}\n::::"
            if table
            else ""
        )
    cell.pop("part", None)
    del cell["outputs"], cell["execution_count"]


def pieces(source, names):
    """`source` cut before each definition in `names`, as (name, text);
    what stands between goes with what follows"""
    lines, cuts = source.splitlines(True), []
    for tree in ast.parse(source).body:
        if (
            isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and showdoc_nm(tree) in names
        ):
            cuts.append((tree.end_lineno, showdoc_nm(tree)))
    starts = [0, *(end for end, _ in cuts[:-1])]
    ends = [*starts[1:], len(lines)]
    return [(name, "".join(lines[a:b]).strip()) for a, b, (_, name) in zip(starts, ends, cuts)]


def tell_exports(cells, module):
    """Each definition of an `exports` cell gets its heading above and its parameters below; nbdev
    heaps them together. What the lesson does not show is told at the end of the page, so that the
    story goes on"""
    docs = {
        m[1]: c
        for c in cells
        if c.get("has_sd") and (m := re.search(r"^show_doc\((.+)\)$", c.source, re.M))
    }
    cut = {
        i: pieces(OPTION.sub("", c.source), docs)
        for i, c in enumerate(cells)
        if "exports" in (c.get("directives_") or {})
    }
    told, out = {name for parts in cut.values() for name, _ in parts}, []
    for i, cell in enumerate(cells):
        for name, text in cut.get(i, []):
            code = dict(cell, source=text, outputs=[])
            out += [
                NbCell(0, dict(docs[name], part="head")),
                NbCell(0, code),
                NbCell(0, dict(docs[name], part="table")),
            ]
        if cut.get(i):
            out[-2].outputs = cell.outputs
        elif not cell.get("has_sd"):
            out.append(cell)
    rest = sorted((c for name, c in docs.items() if name not in told), key=source_line)
    return out + ([mk_cell(f"## Also in `{module}`", "markdown")] if rest else []) + rest


def source_line(cell):
    found = re.search(r"#L(\d+)", json.dumps(cell.outputs))
    return int(found[1]) if found else 0


def admonition(kind, title, body):
    head = f"{{{kind}}}" if kind else f"{{admonition}} {title}\n:class: {slug(title)}"
    return f"::::{head}\n{body}\n::::\n"


@cache
def headings(notebook):
    "The names with a heading of their own, as anchors: nbdev links to private and hidden ones, too"
    cells = notebooks.code_cells(notebooks.load(get_config().nbs_path / notebook))
    shown = [
        notebooks.source(c)
        for c in cells
        if re.match(r"#\|\s*exports?\b(?!.*^#\|\s*hide)", notebooks.source(c), re.M | re.S)
    ]
    return {
        slug(name)
        for code in shown
        for name in re.findall(r"^(?:def|class|async def) ([A-Za-z]\w*)", code, re.M)
    }


def markdown_cell(cell, page, pages, base):
    """Mermaid, call-outs, and links to pages of the published site,
    which become links between notebooks"""

    def link(m):
        if not (notebook := pages.get(m[1])):
            return m[0]
        name = (m[2] or "")[1:].partition(".")[0]  # a method stands below its class
        anchor = "#" + name if name in headings(notebook) else ""
        return f"]({posixpath.relpath(notebook, posixpath.dirname(page) or '.')}{anchor})"

    text = notebooks.BADGE.sub("", cell.source)
    text = re.sub(
        r"^```mermaid\n(.*?)^```",
        lambda m: f'<pre class="mermaid">\n{html.escape(m[1]).strip()}\n</pre>',
        text,
        flags=re.M | re.S,
    )
    text = re.sub(r"\]\(" + re.escape(base) + r"([^)#\s]+)(#[^)\s]*)?\)", link, text)
    cell.source = callouts(lower_anchors(text), admonition)


def module_name(raw):
    found = (
        re.search(r"^#\|\s*default_exp\s+(\S+)", notebooks.source(c), re.M)
        for c in notebooks.code_cells(raw)
    )
    return next((m[1] for m in found if m), "")


def without_lead_ins(cells):
    """A paragraph that ends in a colon leads in the next cell; where the page does not show that
    cell (`#| export`, `#| hide`), the paragraph goes too"""
    shown = []
    for cell, after in zip(cells, [*cells[1:], None]):
        unseen = after and re.match(r"#\|\s*(export|hide)\s*\n", notebooks.source(after))
        text = notebooks.source(cell).rstrip()
        if cell["cell_type"] == "markdown" and unseen and text.endswith(":"):
            text = text.rpartition("\n\n")[0]
            if not text:
                continue
            cell = cell | {"source": text}
        shown.append(cell)
    return shown


def convert(text, page):
    "The notebook `text` of `page` (a path below the notebooks folder), ready for myst-nb"
    config, pages = get_config(), site_pages()
    raw = json.loads(text)
    raw["cells"] = without_lead_ins(raw["cells"])
    map_ids = [c["id"] for c in raw["cells"] if "map" in c["metadata"].get("tags", [])]
    nb = dict2nb(raw)
    nb["path_"] = page
    SphinxFilter()(nb)
    nb.metadata.pop("widgets", None)
    nb.cells = tell_exports(nb.cells, f"{config.lib_path.name}.{module_name(raw)}")
    for cell in nb.cells:
        if cell.get("id") in map_ids:
            cell.cell_type, cell.source = "markdown", cards()
        elif cell.cell_type == "code":
            code_cell(cell)
        if cell.cell_type == "markdown":
            markdown_cell(cell, page, pages, f"{config.doc_host}{config.doc_baseurl}/")
    front = getattr(nb, "frontmatter_", {})
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and "AUTOGENERATED" not in c.source]
    head = f"# {front.get('title', Path(page).stem)}"
    if "description" in front:
        head += f"\n\n{{.lead}}\n{front['description']}"
    nb.cells.insert(0, mk_cell(head, "markdown"))
    raise_headings(nb.cells)
    for i, cell in enumerate(nb.cells):  # one cell may have become several
        cell.id = f"cell-{i}"
    return nb


def raise_headings(cells):
    "Names documented before the first section get its level: headings skip none"
    for cell in cells[1:]:
        if cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.M):
            return
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^###+ ", "## ", cell.source, flags=re.M)


# The map ------------------------------------------------------------------------------------------


def chapters():
    "Folder → its lessons as (page, number, title, promise), in reading order, without `index`"
    nbs, found = get_config().nbs_path, {}
    for path in notebooks.lessons(nbs.parent):
        page = path.relative_to(nbs).with_suffix("")
        if page.as_posix() != get_config().readme_nb.removesuffix(".ipynb"):
            title, promise = notebooks.title(path)
            found.setdefault(page.parent.name, []).append(
                (page.as_posix(), notebooks.number(page), title, promise)
            )
    return found


def cards():
    "The map of the lessons as a card for each folder"
    made = [
        "::::::{grid} 1 1 2 2",
        ":gutter: 3",
        ":margin: 0",
        ":padding: 0",
        ":class-container: lesson-map",
    ]
    for folder, lessons in chapters().items():
        made += ["", f":::::{{grid-item-card}} {notebooks.readable(folder) or 'Start here'}"]
        made += [
            f"- [{number} {title}]({page}.ipynb)<br>[{promise}]{{.promise}}"
            for page, number, title, promise in lessons
        ] + [":::::"]
    return "\n".join([*made, "::::::"])


def toctrees():
    "Hidden toctrees, one for each folder"
    made = []
    for folder, lessons in chapters().items():
        entries = [f"{number} {title} <{page}>".strip() for page, number, title, _ in lessons]
        made += [
            "```{toctree}",
            ":hidden:",
            f":caption: {notebooks.readable(folder) or 'Start here'}",
            "",
            *entries,
            "```",
            "",
        ]
    return "\n".join(made)


# Sphinx -------------------------------------------------------------------------------------------


def source_read(app, docname, source):
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        nb = convert(source[0], path.relative_to(app.srcdir).as_posix())
        if docname == app.config.root_doc:
            nb.cells.append(mk_cell(toctrees(), "markdown"))
        source[0] = nb2str(nb)


def always_fresh(app, env, added, changed, removed):
    "The front page shows all lessons: read it again whenever one has changed"
    return [app.config.root_doc] if added or changed or removed else []


def fix_math(app, doctree):
    "Leave equations that number themselves with `\\tag` alone"
    for node in doctree.findall(nodes.math_block):
        text = node.astext()
        if r"\tag" in text and not node.get("nowrap", node.get("no-wrap")):
            node["nowrap"] = node["no-wrap"] = True
            node[:] = [nodes.Text(f"\\[{text}\\]")]


def page_context(app, pagename, templatename, context, doctree):
    if 'class="mermaid"' in context.get("body", ""):
        more = vendor.attributes("mermaid.min.js")
        app.add_js_file(app.config.mermaid_js, loading_method="defer", priority=600, **more)
        app.add_js_file("mermaid-init.js", loading_method="defer", priority=601)


def redirects(app, error):
    "Pages at the addresses that `nbdev_docs` uses, so that links from other nbdev projects arrive"
    if error or app.builder.name != "html":
        return
    for page, notebook in site_pages().items():
        place, target = Path(app.outdir) / page, Path(notebook).with_suffix(".html").name
        if target != place.name:
            place.write_text(
                '<!doctype html><meta charset="utf-8"><title>moved</title><meta'
                ' http-equiv="refresh" content="0;'
                f' url={target}"><script>location.replace("{target}" + location.hash)</script><a'
                f' href="{target}">moved</a>\n'
            )


def part(app, error):
    "A page that opens in a new tab gets no hold on ours"
    if error or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        old = page.read_text(encoding="utf-8")
        new = re.sub(r'(<a (?![^>]*\brel=)[^>]*\btarget="_blank")', r'\1 rel="noopener"', old)
        if new != old:
            page.write_text(new, encoding="utf-8")


def setup(app):
    tools = b"".join(
        p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))
    )  # other tools: read all pages again
    os.environ.setdefault("IN_TEST", "1")  # as nbdev does when it makes docs
    app.add_config_value("mermaid_js", "", "html")
    app.connect("source-read", source_read)
    app.connect("env-get-outdated", always_fresh)
    app.connect("doctree-read", fix_math)
    app.connect("html-page-context", page_context)
    app.connect("build-finished", redirects)
    app.connect("build-finished", part)
    return dict(
        version="1",
        env_version=zlib.crc32(tools),
        parallel_read_safe=True,
        parallel_write_safe=True,
    )
