"""The reference pages: they say what the chapters, the package and CITATION.cff say, and their examples run."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT
from pybtex.database import parse_string
from sphinx.application import Sphinx

import ihbook
from ihbook.task import EVAL_SETS

BOOK, PACKAGE = ROOT / "book", ROOT / "ihbook"


def pages() -> list[str]:
    """The names of the book's pages, in the order of its table of contents."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())

    def files(node) -> list[str]:
        if isinstance(node, list):
            return [name for each in node for name in files(each)]
        if isinstance(node, dict):
            return [name for key, each in node.items()
                    for name in ([each] if key in ("file", "root") else files(each) if key in ("parts", "chapters", "sections") else [])]
        return []

    return files(toc)


def prose(page: str, *, code: bool = False) -> str:
    """The markdown of a page without its fenced code; with `code`, all of it and the code cells too."""
    if (BOOK / f"{page}.md").exists():
        text = (BOOK / f"{page}.md").read_text()
    else:
        cells = nbformat.read(BOOK / f"{page}.ipynb", 4).cells
        text = "\n\n".join(cell.source for cell in cells if code or cell.cell_type == "markdown")
    return text if code else re.sub(r"^```([^\n]*)\n(.*?)^```[ \t]*$", lambda fence: fence.group(2) if fence.group(1).startswith("{") else "",
                                    text, flags=re.MULTILINE | re.DOTALL)


# --- Symbols ---

LETTERS = re.compile(r"\\(alpha|beta|gamma|delta|epsilon|lambda|mu|sigma|tau|theta|ell|eta|rho|phi|pi)\b|[A-Za-z]")
TOKEN = re.compile(r"\\(?:text|mathrm|operatorname|mathbb|begin|end)\*?\{[^}]*\}|\\[a-zA-Z]+|\\.|[A-Za-z]|\d+|\S")


def symbols(latex: str) -> set[str]:
    """The symbols of a formula: letters, and named words with an index, each with its indices; and lower-case letters in indices.

    `W_Q` is one symbol and `x_a` two, `x_a` and `a`, since a lower-case index is a variable and a capital a name. Powers are left
    out, but a star is part of a name. Functions, operators and words by themselves are not symbols.
    """
    tokens, found = TOKEN.findall(latex), set()

    def argument(i: int) -> tuple[list[str], int]:
        """The tokens of an index that starts at `i`, and where it ends."""
        if tokens[i] != "{":
            return [tokens[i]], i + 1
        depth, start = 1, i + 1
        while depth:
            i += 1
            depth += (tokens[i] == "{") - (tokens[i] == "}")
        return tokens[start:i], i + 1

    i = 0
    while i < len(tokens):
        base, i = tokens[i], i + 1
        name, indexed = base, False
        while i + 1 < len(tokens) and tokens[i] in "_^":
            script, mark = "", tokens[i]
            inside, i = argument(i + 1)
            script = "".join(inside)
            found |= {each for each in symbols(" ".join(inside)) if each[0].islower() or each[0] == "\\"}
            if mark == "_" or re.fullmatch(r"\*|\\text\{.*\}", script):
                name, indexed = f"{name}{mark}{script}", True
        if LETTERS.fullmatch(base) or base.startswith("\\mathbb") or (base.startswith("\\text") and indexed):
            found.add(name)
    return found


def formulas(text: str) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", text)
    blocks = re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL)
    return blocks + re.findall(r"(?<![\\$])\$([^$\n]+)\$", re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL))


def in_math(page: str) -> set[str]:
    return set().union(*map(symbols, formulas(prose(page))))


def table() -> list[tuple[set[str], str]]:
    """The symbols of each row of the glossary's first table, and the page that the row names."""
    rows = re.findall(r"^\| (\$.*?) \| .* \| \{doc\}`(?:[^`<]*<)?([^`>]+)>?` \|$", (BOOK / "glossary.md").read_text(), re.MULTILINE)
    return [(set().union(*map(symbols, formulas(first))), page) for first, page in rows]


def test_the_parser_of_formulas():
    assert symbols(r"s_h = \mathbb{E}\left[\, A_h(q \to \ell_\text{right}) \right]") == {
        "s_h", "h", r"\mathbb{E}", "A_h", "q", r"\ell_\text{right}"}
    assert symbols(r"W_Q\, r_i \cdot \lVert W^{\text{in}}_j \rVert_F^2 / \sqrt{d}") == {"W_Q", "r_i", "i", r"W^\text{in}_j", "j", "d"}
    assert symbols(r"a^* \otimes b \cdot \text{out}_i + \#\text{pairs} \cdot x^2 + \ln 2 + e^{-t} \cos x_{ab}") == {
        "a^*", "b", r"\text{out}_i", "i", "x", "e", "t", "x_ab", "a"}


def test_every_symbol_of_every_page_is_in_the_table():
    known = set().union(*(found for found, _ in table()))
    own = {"later": symbols(r"L_1 L_2 \mu_1 \mu_2 \alpha")}  # another paper's loss, which that page explains where it stands
    own["glossary"] = symbols(r"t s n \ell")  # in a word's own explanation
    missing = {page: unknown for page in pages() if (unknown := in_math(page) - known - own.get(page, set()))}
    assert not missing, f"book/glossary.md has no row for {missing}"


def test_the_table_names_the_page_where_a_symbol_stands_first():
    order, seen = [page for page in pages() if page != "glossary"], set()
    everywhere = {page: in_math(page) for page in order}
    for found, page in table():
        assert page in order, f"book/glossary.md names the page {page}, which is not in _toc.yml"
        for symbol in found:
            first = next((each for each in order if symbol in everywhere[each]), None)
            if symbol not in seen and first is not None:
                assert page == first, f"{symbol} stands first on the page {first}; book/glossary.md says {page}"
            elif first is None:  # not in a formula: in a figure's words, say
                plain = {r"\tau": "τ"}.get(symbol, symbol)
                assert re.search(rf"(?<!\w){re.escape(plain)}(?!\w)", prose(page, code=True)), f"the page {page} has no {symbol}"
            else:  # its second sense
                assert symbol in everywhere[page], f"the page {page} has no {symbol}"
        seen |= found


# --- Words ---

def terms() -> list[str]:
    """The words that the glossary explains."""
    blocks = re.findall(r"^```\{glossary\}\n(.*?)^```", (BOOK / "glossary.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith(" ")]


def test_the_glossary_explains_each_word_once_and_explains_what_pages_refer_to():
    known = terms()
    assert len(known) > 60 and len(set(known)) == len(known)
    assert {"1.3", "five steps", "subcircuits", "induction strength", "phase change", "run", "step", "clamp",
            *(each.name for each in EVAL_SETS)} <= set(known)
    for page in pages():
        text = prose(page)
        used = re.findall(r"\{term\}`([^`]+)`", re.sub(r"``.*?``", "", text))
        for each in used:
            target = re.fullmatch(r"(?:.*<)?([^<>]+)>?", each, re.DOTALL).group(1)
            assert " ".join(target.split()) in known, f"{page}: the glossary does not explain {target!r}"


def test_the_glossary_has_every_verdict():
    from ihbook.chapters.claims import WORDS
    assert set(WORDS) <= set(terms())


# --- Names ---

def test_the_examples_of_the_page_of_names_run():
    blocks = re.findall(r"^```python\n(.*?)^```", (BOOK / "names.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "names.md", "exec"), names)
    assert len(blocks) > 8 and all(len(line) <= 88 for block in blocks for line in block.splitlines())


def test_the_page_of_names_has_every_activation():
    from ihbook.model import KIND
    tables = re.findall(r"^\| (`[^|]+) \|", (BOOK / "names.md").read_text(), re.MULTILINE)
    named = [name for cell in tables for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(set(KIND)) == sorted(set(KIND) & set(named)) and all(named.count(name) >= 2 for name in KIND)


# --- API ---

def modules() -> set[str]:
    """Every module of the package, by its dotted name."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")
             if "jupyter" not in path.parts]  # the kernel is a script
    return {".".join(part for part in each if part != "__init__") for each in parts}


def public(module: str) -> set[str]:
    """The functions and classes that a module defines, without a leading underscore, by their full names."""
    path = PACKAGE.parent / Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return {f"{module}.{node.name}" for node in ast.parse(source.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")}


def test_the_api_has_a_section_for_every_module():
    text = (BOOK / "api.md").read_text()
    shown = re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)
    inner = [f"ihbook.{name}" for name in re.findall(r"^\| `(engine\.\w+)` \|", text, re.MULTILINE)]
    titles = re.findall(r"^#{3,4} ([a-z_.]+)$", text, re.MULTILINE)
    assert sorted(shown + inner) == sorted(modules() - {"ihbook", "ihbook.__main__"})
    assert [f"ihbook.{title}" for title in titles] == shown
    table = re.findall(r"\{py:obj\}`~ihbook\.[\w.]*\.(\w+)`", text)
    assert sorted(table) == sorted(ihbook.__all__)


@pytest.mark.slow
def test_the_built_api_has_every_public_name_and_no_other(tmp_path):
    """Sphinx builds the page as the book does, only alone; a name without a docstring would be missing."""
    settings = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]
    assert {"sphinx.ext.autodoc", "ihbook.chapters.rebuild"} <= set(settings["extra_extensions"])
    source = (BOOK / "api.md").read_text()
    (tmp_path / "index.md").write_text(re.sub(r"\{doc\}`[^`]*`", "the glossary", source))
    warnings = (tmp_path / "warnings").open("w+")
    config = {name: value for name, value in settings["config"].items() if name.startswith(("autodoc", "add_module", "default_role"))}
    app = Sphinx(tmp_path, None, tmp_path / "out", tmp_path / "trees", "html", status=None, warning=warnings, confoverrides={
        "extensions": ["myst_parser", "ihbook.chapters.rebuild", "sphinx.ext.autodoc"], "root_doc": "index", **config})
    app.build()
    warnings.seek(0)
    assert app.statuscode == 0 and warnings.read() == ""
    page = (tmp_path / "out/index.html").read_text()
    shown = [name for name in re.findall(r'<dt class="sig[^>]* id="(ihbook[\w.]+)"', page)]
    listed = re.findall(r"^\.\. automodule:: (\S+)$", source, re.MULTILINE)
    expected = set().union(*(public(module) for module in listed))
    assert len(expected) > 150 and expected <= set(shown), expected - set(shown)
    stale = {name for name in shown if not any(name == each or name.startswith(each + ".") for each in expected)}
    assert not stale and "&lt;factory&gt;" not in page and "~ihbook" not in page


# --- Later work, citation ---

def test_the_page_of_later_work_says_which_papers_were_only_read_as_abstracts():
    text = prose("later")
    entries = parse_string((BOOK / "references.bib").read_text(), "bibtex").entries
    abstracts = {key for key, entry in entries.items() if "abstract or a summary only" in entry.fields.get("note", "").replace("We", "we")}
    listed = text.split("| only the abstract or a summary read |")[1].split("\n## ")[0]
    assert set(re.findall(r"\{cite:t\}`(\w+)`", listed)) == abstracts and len(abstracts) == 9
    for key in abstracts:  # and again where the paper is described
        [line] = [line for line in text.splitlines() if line.startswith("**") and f"`{key}`" in line]
        assert "abstract only" in line or "abstracts only" in line
    cited = set(re.findall(r"\{cite:[pt]\}`([\w,]+)`", text))
    assert {key for each in cited for key in each.split(",")} <= set(entries)


def test_the_citation_is_the_one_of_citation_cff():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper, blocks = cff["preferred-citation"], re.findall(r"^```bibtex\n(.*?)^```", (BOOK / "cite.md").read_text(), re.MULTILINE | re.DOTALL)
    entries = parse_string("\n".join(blocks), "bibtex").entries
    ours, book = entries["singh2024induction"], entries["ihbook"]

    def plain(text: str) -> str:
        return re.sub(r"[{}]", "", text)

    def people(entry):
        return [(" ".join(person.first_names + person.middle_names), " ".join(person.last_names)) for person in entry.persons["author"]]

    assert plain(ours.fields["title"]) == paper["title"]
    assert people(ours) == [(each["given-names"], each["family-names"]) for each in paper["authors"]]
    assert ours.fields["year"] == str(paper["year"]) and ours.fields["pages"] == f"{paper['start']}--{paper['end']}"
    assert paper["collection-title"] == f"{ours.fields['booktitle']}, {ours.fields['publisher']} {ours.fields['volume']}"
    assert ours.fields["url"].endswith(paper["identifiers"][0]["value"].removeprefix("arXiv:"))
    assert (plain(book.fields["title"]), book.fields["version"], book.fields["license"]) == (cff["title"], cff["version"], cff["license"])
    assert plain(str(book.persons["author"][0])) == cff["authors"][0]["name"]
    bibliography = parse_string((BOOK / "references.bib").read_text(), "bibtex").entries["singh2024induction"]
    assert bibliography == ours
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert version == cff["version"]
