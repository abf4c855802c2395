"""`cloven generate`: text from a split model."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from cloven.cli import peer_options as peer


def generate(
    half: peer.Half,
    prompt: Annotated[str, typer.Option(help="The prompt; - reads standard input (arguments are visible to other users of the machine).")],
    worker: peer.Workers = None,
    placement: peer.Placement = "replicas",
    pads: peer.Pads = None,
    on_empty: peer.OnEmpty = "fail",
    enclave: peer.Enclave = None,
    server: peer.AdapterServer = None,
    base: peer.Base = None,
    pin: peer.Pin = None,
    keys: peer.Keys = None,
    exposed: peer.Exposed = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Draft N tokens from earlier in the text: fewer exchanges. Whoever counts rows sees how many."
        ),
    ] = None,
    assistant: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Draft with this small, unprotected model, in this process. Accepted tokens can be counted."),
    ] = None,
    dtype: peer.Dtype = "auto",
    timeout: peer.Timeout = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of streaming.")] = False,
    backend: Annotated[str, typer.Option(help="Private LoRA: lwe, or fhe for comparison.")] = "lwe",
    insecure_plain_tcp: peer.InsecurePlainTcp = False,
    insecure_fhe_semi_honest: Annotated[
        bool, typer.Option("--insecure-fhe-semi-honest", help="Allow --backend fhe, which protects the input only.")
    ] = False,
) -> None:
    """Generate text with a protected model. Tokens are streamed to standard output."""
    from cloven.cli.threads import let_threads_sleep

    if enclave is None or worker:  # an enclave computes while one thread of the model's spins and the others wait: a step answers sooner so
        let_threads_sleep()
    import os

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    import cloven
    from cloven.cli.drafting import open_drafting
    from cloven.cli.hardening import forbid_core_dumps
    from cloven.errors import BadInput
    from cloven.model.quiet import quiet_transformers
    from cloven.serving.half import open_half

    forbid_core_dumps()
    quiet_transformers()
    if dtype not in ("auto", "float32", "bfloat16"):
        raise BadInput(f"dtype {dtype!r}: choose auto, float32 or bfloat16")
    address = open_half(half, " ".join(worker or []) or None, enclave, server).address
    drafting = open_drafting(half, prompt_lookup, assistant)
    text = sys.stdin.read() if prompt == "-" else prompt
    for name in ("CLOVEN_WORKER", "CLOVEN_ENCLAVE", "CLOVEN_SERVER", "CLOVEN_KEYS", "CLOVEN_EXPOSED"):
        os.environ.pop(name, None)  # attached below, with all settings
    os.environ.update({name: value for name, value in (("CLOVEN_BASE", base), ("CLOVEN_PIN", pin)) if value})  # read while loading
    model = AutoModelForCausalLM.from_pretrained(half, dtype=dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(half, trust_remote_code=False)
    inputs = tokenizer(text, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise BadInput("the prompt is empty")
    drafting.check_length(length, max_new_tokens, model.config)
    if seed is not None:
        torch.manual_seed(seed)
    more: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    more |= drafting.arguments()
    options: dict[str, Any] = {"timeout": timeout, "insecure_plain_tcp": insecure_plain_tcp, "pin": pin}
    options |= {"placement": placement, "pads": pads, "on_empty": on_empty}
    options |= {"backend": backend, "insecure_fhe_semi_honest": insecure_fhe_semi_honest}
    with cloven.attach(model, address, keys, exposed=exposed, **options) as session:
        streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        started = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=_pad(tokenizer), **more)
        seconds = time.perf_counter() - started
        total = session.telemetry.total()
    new = output[0, length:]
    if as_json:
        report = {
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "tokens": new.tolist(),
            "prompt_tokens": length,
            "seconds": seconds,
            "tokens_per_s": len(new) / seconds,
            "exchanges": total.exchanges,
            "exchanges_per_token": total.exchanges / max(1, len(new)),
            "bytes_up": total.bytes_up,
            "bytes_down": total.bytes_down,
            "seconds_waiting": total.seconds_waiting,
        }
        typer.echo(json.dumps(report))


def _pad(tokenizer: object) -> int | None:
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else getattr(tokenizer, "eos_token_id", None)
