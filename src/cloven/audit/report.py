"""The report of an audit: one HTML file without anything from elsewhere, for those who decide as well as for those who check."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Sequence

from cloven.audit.attack import Attack, Verdict
from cloven.audit.findings import Findings
from cloven.audit.plots import svg_of

_ORDER: tuple[Verdict, ...] = ("broken", "measured", "holds")  # the worst first
_MEANING = {
    "holds": "no attack did better than chance, give or take three standard deviations, or than what anybody has without the bundle",
    "measured": "something is gained, or no claim is made: read the figure",
    "broken": "an attack succeeds: do not rely on this",
}
_ADVERSARIES = {
    "A1": "Curious worker: records everything",
    "A1 keys": "Curious worker that was given the scramble's keys",
    "A1 columns": "Curious worker that knows some columns' places",
    "A1 relative": "Curious worker that has a public relative of the model",
    "A2": "Malicious worker: answers wrongly",
    "A3": "Cache thief: has a snapshot of the accelerator's cache",
    "A3 idle": "Cache thief, while the session is idle and sealed",
    "A4": "Thief of the accelerator's weights (who watches it while it runs sees the conversation: not protected)",
    "A5": "Adapter server: wants the client's input",
    "A6": "Extracting client: wants the adapter",
    "A8": "API user in league with the worker",
}
_ADVICE = {
    "A1": "If something is broken: a larger --secret-fraction, or an exposed half that stays on machines of fewer people.",
    "A1 keys": "Keep OUT/trusted to itself. A larger --secret-fraction makes training dearer for whoever has the keys.",
    "A1 columns": "If a part of a scramble has leaked, take the exposed half back; a second bundle beside it gives more away.",
    "A1 relative": "If a relative of the model is public, split with --public-base or --adapter; the scramble is no protection then.",
    "A2": "Wrong answers are refused before they are used. A refused worker's address needs the operator before it is used again.",
    "A3": "Use mode session with --seal-idle. Whoever knows a part of the conversation, such as the system prompt, may learn the rest.",
    "A4": "If the accelerator itself is watched, split with SLIP and --secret-fraction 0: the conversation then never reaches it.",
    "A5": "The content of queries is encrypted; where their number matters, use --fixed-length.",
    "A6": "What clients may learn is metered: set budgets when the bundle is prepared, and watch `cloven ledger`.",
    "A8": "Offer text, not logits and not log probabilities, at an endpoint.",
}
_TRAINS = ("A1", "A1 keys")
_GIVEN_MORE = {"public relative": "A1 relative", "the scramble": "A1 keys", "who knows": "A1 columns"}
_IN_WORDS = {  # those that do not begin with their letter and number
    "has the public model and a snapshot of the cache": "A3",
    "has the public model and the device's weights": "A4",
    "a server that wants the input": "A5",
    "a client that wants the adapter": "A6",
    "a client that sends honest queries": "A6",
}
_TITLES = {"slip": "SLIP: weights split between two machines", "kv-shield": "KV-Shield: the keyed KV cache", "private-lora": "Private LoRA"}
_STYLE = importlib.resources.files("cloven.audit").joinpath("report.css")


def report(findings: Findings) -> str:
    """The page.

    Raises:
        BadInput: there are figures, and Matplotlib is not installed.
    """
    title, style = _TITLES[findings.scheme], _STYLE.read_text(encoding="utf-8")
    not_tested = "".join(f"<li>{_text(line)}</li>" for line in findings.not_tested)
    parameters = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in findings.parameters.items())
    figures = "".join(
        f"<figure>{svg_of(figure)}<figcaption><strong>{_text(figure.title)}.</strong> {_text(figure.note)}</figcaption></figure>"
        for figure in findings.figures
    )
    cards = "".join(_card(findings, code, attacks) for code, attacks in _by_adversary(_own(findings)))
    meanings = "; ".join(f"{_verdict(verdict)}: {_text(_MEANING[verdict])}" for verdict in _ORDER[::-1])
    parts = [
        f"<h1>Audit: {_text(title)}</h1>",
        "<p class=lead>Attacks that were run against this bundle, and against the same system without its protection. Keep this page with "
        "the bundle's secret half: figures may show what is secret, such as singular values.</p>",
        f"<h2>In short</h2>{_own_mode(findings)}<ul class=cards>{cards}</ul>",
        f"<p><small>{meanings}.</small></p>",
        f"<h2>Figures</h2>{figures}" if figures else "",
        f"<h2>Attacks</h2>{_matrix(findings) if findings.scheme == 'kv-shield' else _tables(findings)}",
        f"<h2>What was not tested</h2><ul>{not_tested}</ul>" if not_tested else "",
        f"<h2>Parameters</h2><dl>{parameters}</dl>" if parameters else "",
    ]
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>cloven audit</title><style>{style}</style>"
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def code_of(attack: Attack) -> str:
    """The adversary's letter and number, or its words where it has none: then it has a headline of its own."""
    first = attack.adversary.split(",")[0].split()[0]
    if first == "A1":
        return next((code for words, code in _GIVEN_MORE.items() if words in attack.adversary), first)
    code = first if first in _ADVERSARIES else _IN_WORDS.get(attack.adversary, attack.adversary)
    return "A3 idle" if code == "A3" and attack.scheme.endswith("/sealed") else code


def worst(attacks: Iterable[Attack]) -> Verdict:
    """The worst verdict of several attacks."""
    return min((attack.verdict for attack in attacks), key=_ORDER.index)


def _own(findings: Findings) -> list[Attack]:
    """The attacks on what the bundle is: others are there to compare, in other modes, on other splits, or beyond a budget."""
    parameters = findings.parameters
    if "mode" in parameters:
        modes = [parameters["mode"], *(["sealed"] if parameters["seal_idle"] else [])]
        return [attack for attack in findings.attacks if attack.scheme.rpartition("/")[2] in modes]
    if "scheme" in parameters:
        return [attack for attack in findings.attacks if attack.scheme == parameters["scheme"]]
    return findings.attacks


def _own_mode(findings: Findings) -> str:
    parameters, sentences = findings.parameters, list[str]()
    if "mode" in parameters:
        idle = ", sealed while idle" if parameters["seal_idle"] else ""
        sentences.append(f"This bundle's mode: <strong>{_text(parameters['mode'])}{idle}</strong>. The others are below, to compare.")
    if parameters.get("scramble") == "mixing":
        sentences.append("This bundle's scramble: <strong>mixing</strong>. What permutations alone would give is below, to compare.")
    if "kept_secret" in parameters:
        sentences.append(f"Kept secret: {_text(parameters['kept_secret'])}. Exposed whole: {_text(parameters['exposed_whole'])}.")
    if "of_the_fine_tune_exposed" in parameters:
        sentences.append(f"Of the fine-tune, {_text(parameters['of_the_fine_tune_exposed'])} is exposed.")
    return f"<p>{' '.join(sentences)}</p>" if sentences else ""


def _by_adversary(attacks: Sequence[Attack]) -> list[tuple[str, list[Attack]]]:
    codes = sorted({code_of(attack) for attack in attacks})
    return [(code, [attack for attack in attacks if code_of(attack) == code]) for code in codes]


def headlines(findings: Findings) -> list[tuple[str, Verdict, str]]:
    """For every adversary of the bundle: who, the worst verdict, and what qualifies it ("" if nothing does)."""
    return [(_headline(code), *_judged(findings, code, attacks)) for code, attacks in _by_adversary(_own(findings))]


def _judged(findings: Findings, code: str, attacks: list[Attack]) -> tuple[Verdict, str]:
    """The worst verdict; but nothing holds against who could train and was not tried: training is the strongest attack."""
    verdict = worst(attacks)
    if findings.scheme == "slip" and code in _TRAINS and not any(attack.name.startswith("recovery") for attack in attacks):
        return ("measured" if verdict == "holds" else verdict), "training was not tried: give it time by --budget-minutes"
    return verdict, ""


def _card(findings: Findings, code: str, attacks: list[Attack]) -> str:
    verdict, why = _judged(findings, code, attacks)
    counts = ", ".join(f"{sum(a.verdict == v for a in attacks)} {v}" for v in _ORDER[::-1] if any(a.verdict == v for a in attacks))
    named = [attack for attack in attacks if attack.verdict == verdict and verdict != "holds"]
    qualified = f"<small><strong>{_text(why)}</strong></small>" if why else ""
    most = f"<small>{_text(', '.join(sorted({_name(attack) for attack in named})))}</small>" if named else ""
    advice = f"<small>{_text(_ADVICE[code])}</small>" if code in _ADVICE else ""
    return f"<li class={verdict}><strong>{_text(_headline(code))}</strong>{_verdict(verdict)} ({counts}){qualified}{most}{advice}</li>"


def _headline(code: str) -> str:
    return _ADVERSARIES.get(code, code)


def _tables(findings: Findings) -> str:
    """One table for every adversary; then, to compare, one for every other system."""
    own = _own(findings)
    tables = [(_headline(code), attacks) for code, attacks in _by_adversary(own)]
    others = [attack for attack in findings.attacks if attack not in own]
    for scheme in dict.fromkeys(attack.scheme for attack in others):
        tables.append((f"To compare: {scheme}", [attack for attack in others if attack.scheme == scheme]))
    return "".join(f"<h3>{_text(title)}</h3>{_table(attacks)}" for title, attacks in tables)


def _table(attacks: Sequence[Attack]) -> str:
    rows = "".join(
        f"<tr><td><strong>{_text(_name(attack))}</strong><small>{_text(attack.metric)}</small>"
        f"<small>{_text(attack.adversary)}</small>{_details(attack)}</td>"
        f"<td class=n data-is=reached>{attack.value:.1%}{_interval(attack)}</td><td class=n data-is=chance>{attack.chance:.1%}</td>"
        f"<td class=n data-is='without protection'>{attack.weakened_value:.1%}</td>"
        f"<td class=n data-is=tries>{attack.tries:,}</td><td data-is=verdict>{_verdict(attack.verdict)}</td></tr>"
        for attack in attacks
    )
    head = "<tr><th>attack<th class=n>reached<th class=n>chance<th class=n>without protection<th class=n>tries<th>verdict</tr>"
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _details(attack: Attack) -> str:
    numbers = "; ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in attack.details.items())
    return f"<small>{_text(numbers)}</small>" if numbers else ""


def _interval(attack: Attack) -> str:
    return f"<small>{attack.interval[0]:.1%} … {attack.interval[1]:.1%}</small>" if attack.interval is not None else ""


def _matrix(findings: Findings) -> str:
    """Attacks by modes."""
    schemes = list(dict.fromkeys(attack.scheme for attack in findings.attacks))
    modes = "".join(f"<th class=n>{_text(scheme.rpartition('/')[2])}" for scheme in schemes)
    rows = ""
    for name in dict.fromkeys(attack.name for attack in findings.attacks):
        found = {attack.scheme: attack for attack in findings.attacks if attack.name == name}
        one = next(iter(found.values()))
        cells = "".join(
            f"<td class='n cell {found[s].verdict}' data-is='{_text(s.rpartition('/')[2])}'>{found[s].value:.1%} "
            f"{_verdict(found[s].verdict)}</td>"
            if s in found
            else "<td>"
            for s in schemes
        )
        rows += (
            f"<tr><td><strong>{_text(_name(one))}</strong><small>{_text(one.metric)}</small><small>{_text(one.adversary)}</small></td>{cells}"
            f"<td class=n data-is=chance>{one.chance:.1%}</td><td class=n data-is=tries>{one.tries:,}</td></tr>"
        )
    return (
        "<p><small>Mode none is the system without the protection.</small></p>"
        f"<table><thead><tr><th>attack{modes}<th class=n>chance<th class=n>tries</tr></thead><tbody>{rows}</tbody></table>"
    )


def _name(attack: Attack) -> str:
    return attack.name.replace("_", " ")


def _verdict(verdict: Verdict) -> str:
    return f"<span class='verdict {verdict}'>{verdict}</span>"


def _text(value: object) -> str:
    return html.escape(str(value))
