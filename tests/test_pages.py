"""What pages say: in both wordings for every claim, from the verdicts, and from the package's own code."""

import math

import pytest

from ihbook import metrics, model
from ihbook.chapters import pages
from ihbook.chapters.claims import CLAIMS, judge
from ihbook.engine import step

WORDED = [key for key in CLAIMS if key in pages.WORDINGS]  # test_every_claim_is_worded holds them to be all


def values(claim, inside):
    """Numbers within a claim's bounds, or outside of them."""
    low, high = (claim.low if claim.low > -math.inf else claim.high - 1), (claim.high if claim.high < math.inf else claim.low + 1)
    return [(low + high) / 2] * 3 if inside else [claim.high + 1 if claim.high < math.inf else claim.low - 1] * 3


def test_every_claim_is_worded():
    assert set(pages.WORDINGS) == set(CLAIMS)
    assert set(pages.HEADLINES) == {claim.chapter for claim in CLAIMS.values()}


@pytest.mark.parametrize("key", WORDED)
def test_a_page_says_whether_a_claim_held(key):
    claim, words = CLAIMS[key], pages.WORDINGS[key]
    held, not_held = judge(key, values(claim, True)), judge(key, values(claim, False))
    assert held.word in ("holds", "check") and not_held.word in ("differs", "direction only")
    said, otherwise = pages.sentence(held), pages.sentence(not_held)
    assert said != otherwise and "{" not in said + otherwise + words.reason
    assert not any(mark in words.reason for mark in "{}")
    for text in (said, otherwise, words.reason):
        assert text[0].isupper() and text.rstrip(")`")[-1] in ".?" and "  " not in text
    assert not pages.discussion([held]).data.count(words.reason[:20]) and words.reason.split("`")[0][:20] in _plain(pages.discussion([not_held]).data)
    assert "never" in pages.sentence(judge(key, [math.inf] * 3)) and pages.sentence(judge(key, [])).startswith("Not tested")


def _plain(text):
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("’", "'")


def test_an_undecided_claim_says_so():
    claim = CLAIMS["plateau"]
    found = judge("plateau", [claim.high - 0.01, claim.high - 0.01, claim.high + 0.5])
    said = pages.sentence(found)
    assert found.word == "undecided" and "3 networks do not settle this" in said and claim.measure in said and claim.holds_if in said
    assert claim.sentence in _plain(pages.discussion([found]).data)


@pytest.mark.parametrize("chapter", pages.HEADLINES)
def test_the_introduction_says_what_a_chapter_found(chapter):
    words = pages.HEADLINES[chapter]
    assert set(words.claims) | set(words.nutshell) <= {key for key, claim in CLAIMS.items() if claim.chapter == chapter}
    found = {inside: {key: judge(key, values(CLAIMS[key], inside)) for key in words.claims} for inside in (True, False)}
    said, otherwise = (pages.headline(chapter, found[inside]) for inside in (True, False))
    assert said != otherwise and "{" not in said + otherwise and said.endswith(".") and otherwise.endswith(".")
    assert "not tested" in pages.headline(chapter, {key: judge(key, []) for key in words.claims})
    assert "never" in pages.headline(chapter, {key: judge(key, [math.inf]) for key in words.claims})


def test_a_tally_counts_what_holds():
    good, bad, none = judge("plateau", [0.7]), judge("plateau", [0.9]), judge("plateau", [])
    assert pages.counted(["holds", "check", "differs", "undecided", "undecided"]) == "1 holds, 1 differs and 2 are undecided"
    assert pages.tally([good, good]) == "Both claims of this chapter hold in this build, on 1 network."
    assert pages.tally([good, bad, bad, none]) == ("Of the 4 claims of this chapter, 1 holds, 2 differ and 1 was not tested "
                                                   "in this build, on 1 network.")


def test_the_toy_model_has_draws_and_not_networks():
    assert pages.tally([judge("toy-plateau", [5.0, 6.0])]).endswith("on 2 draws.")
    assert "draws never get that far" in pages.sentence(judge("toy-shorter", [math.inf] * 3))
    assert "networks never get that far" in pages.sentence(judge("plateau", [math.inf] * 3))


def test_code_in_a_sentence_is_code():
    assert pages.say("Try `-p n < 3` & look.").data == '<p class="said">Try <code>-p n &lt; 3</code> &amp; look.</p>'
    assert pages.tally([judge("plateau", [])]) == "No claim of this chapter was tested in this build."


def test_a_listing_is_the_packages_own_code():
    code = pages.listing(step.update).data
    assert code.startswith("```python\ndef update(") and "The optimiser's part" not in code and "p.sub_(" in code
    part = pages.listing(model.forward, 'attn_out = put("attn_out"', "x = x[:, :, queries] + attn_out").data.splitlines()
    assert len(part) == 4 and part[1].startswith("attn_out = put(") and part[2] == "x = x[:, :, queries] + attn_out"


def test_a_listing_whose_lines_are_gone_is_an_error():
    with pytest.raises(ValueError, match="no line with 'nothing of the kind'"):
        pages.listing(metrics.crossing, "nothing of the kind")
    with pytest.raises(ValueError, match="after 'return'"):
        pages.listing(metrics.crossing, "return", "x, y = ")


def test_across_columns_a_claim_is_said_once_per_verdict():
    found = {"a": judge("plateau", [0.7]), "b": judge("plateau", [0.9]), "c": judge("plateau", [0.7, 0.71]), "d": judge("plateau", [])}
    assert pages.across(found) == "holds on a and c, differs on b and is not tested on d"
