"""Tokens in, text out, while `generate` runs: transformers' streamer with an end of its own.

`generate` calls `put` after every token. What ends the text before its `max_tokens` is decided here: an end-of-sequence token, a stop
string, a client that has left. With a fixed length the text ends, and the tokens go on: they are computed and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from typing import Any

from transformers.cli.serving.utils import DirectStreamer, response_events_to_chunks

from cloven.serving.api_error import unreadable_tool_call
from cloven.serving.stop_strings import StopStrings


class TextEnded(Exception):
    """Ends `generate`: the text is complete, or nobody wants it any longer."""


class Text(DirectStreamer):  # type: ignore[misc]
    """The text of one answer.

    Args:
        tokenizer: of transformers.
        loop, queue: where pieces of text go; None: nowhere, the tokens are kept.
        ends: end-of-sequence tokens that `generate` does not know of.
        stops: strings that end the text and are no part of it.
        fixed_length: go on after the text's end.
        parser: transformers' parser of tool calls and reasoning, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue[Any] | None,
        *,
        ends: Collection[int] = (),
        stops: Sequence[str] = (),
        fixed_length: bool = False,
        parser: Any = None,
    ) -> None:
        super().__init__(tokenizer._tokenizer, loop, queue or asyncio.Queue(), response_parser=parser)
        self._ends, self._stops, self._fixed = frozenset(ends), StopStrings(stops), fixed_length
        self._silent = queue is None
        self._over = self._closed = False
        self._first: bool = True  # of `put`: the prompt
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        """See `DirectStreamer.put`; the prompt comes first, and is skipped."""
        if self._cancelled.is_set():
            raise TextEnded
        if self._first:
            self._first = False
            return
        for token in value.flatten().tolist():
            self.push(token)
            if self._over and not self._fixed:
                raise TextEnded

    def push(self, token: int) -> None:
        """One more token of the answer."""
        if self._over:
            return
        self.tokens.append(token)
        self.total_tokens += 1
        piece = self._decode_stream.step(self._tokenizer, token)
        if piece is not None:
            self._write(self._stops.push(piece))
        self._over = self._stops.found or token in self._ends

    @property
    def over(self) -> bool:
        """Whether the text is complete before its tokens are."""
        return bool(self._over)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any longer."""
        return bool(self._cancelled.is_set())

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._stops.found

    def end(self) -> None:
        """Write what was held back, and say that this was all; once.

        Raises:
            ApiError: the text ends with a tool call that nobody can read.
        """
        if self._closed:
            return
        self._closed = True
        self._write(self._stops.flush())
        if self._parser is not None:
            with contextlib.suppress(ValueError, RuntimeError):  # it was cut off in the middle of a tool call, which is dropped
                self._read(self._parser.finalize()[1])
        self._enqueue(None)

    def _write(self, piece: str) -> None:
        if not piece or self._silent:
            return
        if self._parser is None:
            self._enqueue(piece)
        else:
            self._read(self._parser.feed(piece))

    def _read(self, events: Any) -> None:
        try:
            items = response_events_to_chunks(events)
        except (KeyError, TypeError, AttributeError):
            raise unreadable_tool_call() from None
        for item in items:
            self._enqueue(item)

    def _enqueue(self, item: Any) -> None:
        if not self._silent:
            super()._enqueue(item)
