"""What a page says: its answers in a box at the top, computed from the verdicts at its end; what differs, and why; listings of the
package's own code. The sentences, in both wordings, stand in answers.toml."""

from __future__ import annotations

import ast
import html
import inspect
import math
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from IPython.display import HTML, Markdown, display, update_display

from ihbook.chapters.claims import Claim, Verdict

BOX = "nutshell"  # the display that a chapter's last cell fills
WAITING = "The last cells of this page compute the answers. Run the whole page to see them."


@dataclass(frozen=True)
class Wording:
    """What a page says of a claim: if it holds, if it does not, and why it may not, with a way to find out. `{median}`, `{low}`,
    `{high}` (of the interval) and `{n}` stand for the numbers, formatted as in `{median:.2f}`, `{median:.0%}` or `{median:,.0f}`.
    """

    held: str
    not_held: str
    reason: str


@dataclass(frozen=True)
class Headline:
    """What the introduction says of a chapter, by whether all of `claims` hold, with `{key}` for the median of each; `nutshell`
    are the claims that the chapter's box tells; `of` names what is measured once per seed."""

    title: str
    claims: tuple[str, ...]
    held: str
    not_held: str
    nutshell: tuple[str, ...]
    of: str = "network"


def load(text: str) -> tuple[dict[str, Wording], dict[str, Headline]]:
    """The wordings by claim and the headlines by chapter, from TOML text. Raises TypeError for a field that is missing or
    unknown."""
    found = tomllib.loads(text)
    headlines = {chapter: Headline(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
                 for chapter, fields in found.pop("chapters").items()}
    return {key: Wording(**fields) for key, fields in found.items()}, headlines


WORDINGS, HEADLINES = load(files("ihbook.chapters").joinpath("answers.toml").read_text(encoding="utf-8"))


def sentence(verdict: Verdict) -> str:
    """What a page says of a claim, by its verdict."""
    words = WORDINGS[verdict.key]
    if not verdict.known:
        return f"Not tested in this build: {verdict.claim.sentence}."
    low, high = verdict.interval or (verdict.median, verdict.median)
    numbers = {"median": verdict.median, "low": low, "high": high, "n": verdict.n}
    inside = verdict.claim.low <= verdict.median <= verdict.claim.high
    if math.isinf(verdict.median):
        never = f"at least half of the {_of(verdict)}s never get that far."
        said = f"{verdict.claim.sentence}: {'' if inside else 'not here, as '}{never}"
    else:
        said = (words.held if inside else words.not_held).format(**numbers)
    if verdict.word == "undecided":
        claim = verdict.claim
        return (f"“{claim.sentence}”: {verdict.n} {_of(verdict)}s do not settle this. We measure the {claim.measure}. It is "
                f"{verdict.measured}, and the {_kind([verdict])} asks for {claim.holds_if}.")
    return f"{said} The direction is the paper's." if verdict.word == "direction only" else said


def nutshell() -> None:
    """Show the chapter's box, which `answer` or `fill` fills."""
    display(_box([WAITING]), display_id=BOX)


def fill(sentences: Sequence[str]) -> None:
    """Say these sentences in the chapter's box."""
    update_display(_box(sentences), display_id=BOX)


def say(*sentences: str) -> HTML:
    """A paragraph of these sentences, computed where a page says what was measured."""
    return HTML(f'<p class="said">{_inline(" ".join(sentences))}</p>')


def _inline(text: str) -> str:
    """Words as HTML, with code where backticks are, and a printer's apostrophes elsewhere."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part.replace("'", "’") for i, part in enumerate(parts))


def _box(sentences: Sequence[str], last: str = "") -> HTML:
    said = "".join(f"<p>{_inline(each)}</p>" for each in sentences)
    said += f'<p class="tally">{_inline(last)}</p>' * bool(last)
    return HTML(f'<div class="admonition tip nutshell"><p class="admonition-title">In a nutshell</p>{said}</div>')


def answer(verdicts: Sequence[Verdict], *more: str) -> HTML:
    """Fill the chapter's box from its verdicts, and the sentences `more`; return the discussion of those that do not hold."""
    told = HEADLINES[verdicts[0].claim.chapter].nutshell
    by_key = {verdict.key: verdict for verdict in verdicts}
    update_display(_box([*(sentence(by_key[key]) for key in told), *more], tally(verdicts)), display_id=BOX)
    return discussion(verdicts)


def tally(verdicts: Sequence[Verdict], of: str = "this chapter") -> str:
    """How many of the claims `of` a part of the book hold, in a sentence. Checks are no evidence, and are not counted."""
    words = [verdict.word for verdict in verdicts if not verdict.claim.check]
    most = max(verdict.n for verdict in verdicts)
    kind = _kind(verdicts)
    if not most:
        return f"No {kind} of {of} was tested in this build."
    one_chapter = len({verdict.claim.chapter for verdict in verdicts}) == 1  # otherwise the numbers are of different things
    measured = "in this build" + f", on {most} {_of(verdicts[0])}{'s' * (most != 1)}" * one_chapter
    if set(words) == {"holds"}:
        return f"{'Both' if len(words) == 2 else f'All {len(words)}'} {kind}s of {of} hold {measured}."
    return f"Of the {len(words)} {kind}s of {of}, {counted(words)} {measured}."


def counted(words: Sequence[str]) -> str:
    """How many of these words of verdicts there are: "50 hold, 1 differs and 9 are undecided". Other words are left out."""
    return _listed([f"{n} {one if n == 1 else many}" for word, one, many in (
        ("holds", "holds", "hold"), ("direction only", "holds in direction only", "hold in direction only"),
        ("differs", "differs", "differ"), ("undecided", "is undecided", "are undecided"),
        ("not tested", "was not tested", "were not tested")) if (n := words.count(word))])


def _kind(verdicts: Sequence[Verdict]) -> str:
    return "prediction" if all(verdict.claim.new for verdict in verdicts) else "claim"


def _of(verdict: Verdict) -> str:
    chapter = verdict.claim.chapter
    return HEADLINES[chapter].of if chapter in HEADLINES else "network"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def discussion(verdicts: Sequence[Verdict]) -> HTML:
    """What does not hold, with the likeliest reason and how one would find out."""
    def said(verdict: Verdict) -> str:
        return _inline(sentence(verdict).removeprefix(f"“{verdict.claim.sentence}”: "))  # which is in bold already

    rows = [f"<p><strong>{_inline(verdict.claim.sentence)}</strong> ({_figure(verdict.claim)}; {verdict.word}). "
            f"{said(verdict)} {_inline(WORDINGS[verdict.key].reason)}</p>"
            for verdict in verdicts if verdict.word in ("undecided", "direction only", "differs")]
    untested = [verdict.claim.sentence for verdict in verdicts if verdict.word == "not tested"]
    if untested:
        rows.append(f"<p>Not tested, because no {_of(verdicts[0])} gave a number: {_inline('; '.join(untested))}.</p>")
    return HTML('<div class="discussion">' + ("".join(rows) or f"<p>Nothing differs in this build: every {_kind(verdicts)} of this "
                                              "chapter holds.</p>") + "</div>")


def _figure(claim: Claim) -> str:
    if claim.new:
        return "predicted here"
    return f"Table {claim.figure[1:]}" if claim.figure.startswith("T") else (
        claim.figure if claim.figure.startswith("§") else f"Figure {claim.figure}")


def headline(chapter: str, verdicts: Mapping[str, Verdict]) -> str:
    """What the introduction says of a chapter, from the verdicts on its claims."""
    words = HEADLINES[chapter]
    tested = [verdicts[key] for key in words.claims]
    if any(not verdict.known for verdict in tested):
        return "This build has not tested it."
    numbers = {verdict.key: verdict.median for verdict in tested}
    held = all(verdict.word in ("holds", "check") for verdict in tested)
    if any(map(math.isinf, numbers.values())):
        return f"It {'holds' if held else 'does not hold'} here: some of the {words.of}s never get that far."
    said = (words.held if held else words.not_held).format(**numbers)
    unsettled = not held and all(verdict.word in ("holds", "check", "undecided") for verdict in tested)
    return f"{said} Not all of this is settled by the {words.of}s of this build." if unsettled else said


def headlines(verdicts: Mapping[str, Verdict]) -> Markdown:
    """The introduction's list: what each chapter found whose claims are among these verdicts, with a link to it."""
    return Markdown("\n".join(f"- [{words.title}]({chapter}.ipynb): {headline(chapter, verdicts)}"
                              for chapter, words in HEADLINES.items() if words.claims[0] in verdicts))


def across(verdicts: Mapping[str, Verdict]) -> str:
    """On which columns of evidence a claim has which verdict, in words: "holds on glyphs and differs on gaussian"."""
    words = [verdict.word for verdict in verdicts.values()]
    parts = [f"{verb} on {_listed([name for name, verdict in verdicts.items() if verdict.word == word])}" for word, verb in (
        ("holds", "holds"), ("check", "holds"), ("direction only", "holds in direction only"), ("undecided", "is undecided"),
        ("differs", "differs"), ("not tested", "is not tested")) if word in words]
    return _listed(parts)


def listing(of: Callable | type, first: str | None = None, last: str | None = None) -> Markdown:
    """The package's own code of a function or class without its docstring, or of it the lines from the first that contains
    `first` to the next that contains `last`. Raises ValueError where there are none, so that a page can't go stale."""
    lines = _without_docstring(inspect.getsource(of))
    start = 0 if first is None else next((i for i, line in enumerate(lines) if first in line), None)
    if start is None:
        raise ValueError(f"{of.__name__} has no line with {first!r}; choose another for first")
    end = len(lines) - 1 if last is None else next((i for i in range(start, len(lines)) if last in lines[i]), None)
    if end is None:
        raise ValueError(f"{of.__name__} has no line with {last!r} after {first!r}; choose another for last")
    code = textwrap.dedent("\n".join(lines[start:end + 1])).rstrip()
    return Markdown(f"```python\n{code}\n```")


def _without_docstring(source: str) -> list[str]:
    source = textwrap.dedent(source)
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1:text.end_lineno] = [None] * (text.end_lineno - text.lineno + 1)
    return [line for line in lines if line is not None]
