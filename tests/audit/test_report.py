from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from cloven.audit.attack import Attack
from cloven.audit.figure import Figure
from cloven.audit.findings import Findings
from cloven.audit.report import code_of, headlines, report, worst

VOID = {"meta", "th", "td", "li", "dt", "dd"}  # never closed, or need not be


class Page(HTMLParser):
    """Tags, their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and tag in self.open:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words += data


def attack(name: str = "liar", verdict: str = "holds", adversary: str = "A2, who lies", scheme: str = "slip/int8") -> Attack:
    return Attack(name, scheme, adversary, "share of <lies>", 0.25, 0.01, 1.0, 1234, verdict)  # type: ignore[arg-type]


FINDINGS = Findings(
    "slip",
    [attack(), attack("full_logits", "broken", "A8, who sees logits"), attack("recovery_full", "measured", "A1, with text")],
    [Figure("f", "A figure", "x", "y", {"line": [(0.0, 1.0), (1.0, 2.0)]})],
    {"seed": 7, "text": "given & kept"},
    ("Side <channels>.",),
)


def test_a_page_that_needs_nothing_from_elsewhere() -> None:
    page = report(FINDINGS)
    parsed = Page(page)
    assert not [address for address in parsed.addresses if not address.startswith("#")]
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert parsed.open in (["html"], [])


def test_everything_is_there() -> None:
    words = Page(report(FINDINGS)).words
    for text in ("Audit: SLIP", "full logits", "25.0%", "1,234", "share of <lies>", "Side <channels>.", "given & kept", "A figure"):
        assert text in words, text
    for headline in ("Curious worker", "Malicious worker", "API user"):
        assert headline in words


def test_the_worst_verdict_is_the_headline() -> None:
    assert worst([attack(), attack(verdict="measured")]) == "measured"
    page = report(FINDINGS)
    assert re.search(r"<li class=broken><strong>API user", page) and re.search(r"<li class=holds><strong>Malicious", page)


def test_modes_by_attacks() -> None:
    found = [
        attack("table", "broken", "has the public model and a snapshot of the cache", f"kv-shield/{mode}") for mode in ("none", "session")
    ]
    page = report(Findings("kv-shield", found))
    words = Page(page).words
    assert "none" in words and "session" in words and "Cache thief" in words and "<h2>Figures" not in page and "not tested" not in words


@pytest.mark.parametrize(
    ("adversary", "code"),
    [
        ("A1, given much", "A1"),
        ("A1 and A8, with a recording", "A1"),
        ("A1, given embeddings, norms and scales, with text, and the scramble", "A1 keys"),
        ("A1, who knows 16 of 256 columns", "A1 columns"),
        ("A1, who has a public relative", "A1 relative"),
        ("A8, who sees", "A8"),
        ("A2", "A2"),
    ],
)
def test_adversaries(adversary: str, code: str) -> None:
    assert code_of(attack(adversary=adversary)) == code


def test_adversaries_of_private_lora_have_a_headline() -> None:
    from cloven.audit.private_lora import division, subject

    for words, code in ((subject.CLIENT, "A6"), (subject.SERVER, "A5"), (division.CLIENT, "A6")):
        assert code_of(attack(adversary=words, scheme="private-lora/lwe")) == code


def test_an_adversary_that_nobody_has_numbered() -> None:
    page = report(Findings("private-lora", [attack(adversary="somebody else", scheme="private-lora/lwe")]))
    assert "<strong>somebody else</strong>" in page


@pytest.mark.parametrize(("seal_idle", "headline"), [(False, "holds"), (True, "holds")])
def test_the_headline_is_about_the_bundles_own_mode(seal_idle: bool, headline: str) -> None:
    thief = "A3, who has the public model"
    found = [
        attack("table", verdict, thief, f"kv-shield/{mode}")
        for mode, verdict in (("none", "broken"), ("session", "holds"), ("sealed", "measured"))
    ]
    page = report(Findings("kv-shield", found, parameters={"mode": "session", "seal_idle": seal_idle}))
    assert re.search(rf"<li class={headline}><strong>Cache thief", page) and ("sealed while idle" in page) is seal_idle
    assert ("<li class=measured><strong>Cache thief, while the session is idle and sealed" in page) is seal_idle
    assert page.count("<td class='n cell broken'") == 1  # none is in the table all the same


def test_what_permutations_would_give_is_no_headline() -> None:
    own, other = "slip/int8, mixing", "slip/int8, permutation"
    found = [attack("full_logits", "holds", "A8, who sees", own), attack("full_logits", "broken", "A8, who sees", other)]
    page = report(Findings("slip", found, parameters={"scramble": "mixing", "scheme": own}))
    assert re.search(r"<li class=holds><strong>API user", page) and "This bundle's scramble: <strong>mixing" in page
    assert page.count(other) == 1 and "<h3>To compare: slip/int8, permutation</h3>" in page and "Offer text, not logits" in page
    permuted = report(Findings("slip", found[1:], parameters={"scramble": "permutation", "scheme": other}))
    assert re.search(r"<li class=broken><strong>API user", permuted) and "This bundle's scramble" not in permuted


def test_nothing_holds_against_who_could_train_and_was_not_tried() -> None:
    quiet = [attack("exposed_half", "holds", "A1, given much"), attack("liar", "holds")]
    found = Findings("slip", quiet, parameters={"scheme": "slip/int8"})
    assert headlines(found) == [
        ("Curious worker: records everything", "measured", "training was not tried: give it time by --budget-minutes"),
        ("Malicious worker: answers wrongly", "holds", ""),
    ]
    assert "training was not tried" in report(found)
    tried = Findings("slip", [*quiet, attack("recovery_scrambled", "holds", "A1, with text")], parameters={"scheme": "slip/int8"})
    assert headlines(tried)[0][1:] == ("holds", "") and "training was not tried" not in report(tried)


def test_answers_beyond_a_budget_are_no_headline() -> None:
    own = "private-lora/lwe"
    found = [
        attack("regression_budget", "measured", "a client that wants the adapter", own),
        attack("regression_all", "broken", "a client that wants the adapter", f"{own}, more answers than the budget allows"),
        attack("division", "holds", "a client that sends honest queries", "private-lora/fhe"),
    ]
    page = report(Findings("private-lora", found, parameters={"scheme": own}))
    assert "<li class=measured><strong>Extracting client" in page and page.count("<li class=") == 1
    assert "To compare: private-lora/lwe, more answers than the budget allows" in page and "To compare: private-lora/fhe" in page


def test_attacks_stand_under_their_adversaries() -> None:
    page = report(FINDINGS)
    heads = re.findall("<h3>(.*?)</h3>", page)
    assert heads == ["Curious worker: records everything", "Malicious worker: answers wrongly", "API user in league with the worker"]
    assert page.index(heads[2] + "</h3>") < page.index("<strong>full logits")


def test_a_figure_says_how_it_is_read_and_a_bundle_what_it_keeps() -> None:
    figures = [replace(FINDINGS.figures[0], note="Higher is safer.")]
    kept = {"kept_secret": "3 % of the parameters", "exposed_whole": "8 of 36 matrices"}
    words = Page(report(replace(FINDINGS, figures=figures, parameters=kept))).words
    assert "A figure. Higher is safer." in words and "Kept secret: 3 % of the parameters. Exposed whole: 8 of 36 matrices." in words


def test_intervals_and_further_numbers_are_shown() -> None:
    page = report(Findings("slip", [replace(attack(), interval=(0.0123, 0.0456), details={"perplexity_of_the_model": 13.24})]))
    assert "1.2% … 4.6%" in page and "perplexity of the model 13.24" in page
