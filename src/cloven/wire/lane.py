"""A lane: memory that two processes on one host share, for exchanges that need no socket.

    offset 0      numbers and lengths of the request and of the answer, 32 bits each
    offset 256    request: header [2048], payload [CAPACITY]        then the answer, alike

    1. the client writes header and payload, their lengths, and rings number n
    2. the server takes private copies and overwrites what it took with zeros; only then it looks at them
       (rows of a step, which are numbers and nothing else, are read once, a block at a time: kv_shield/native/step.cpp; masked rows are
   copied and left, worker/native/serve.cpp)
    3. the server writes the answer and rings n; the client takes it likewise

A server without CURVE keys offers a lane to a peer that its ZeroMQ socket has admitted (see `wire.admission`); messages, schema and limits
are those of the socket. What does not fit goes through the socket, and so does everything after either side has gone. The memory is a memfd
of sealed size (nobody can truncate it under the other), passed over a Unix socket in the ipc address's folder (mode 0700) to a process of
the same user; that connection stays, and its end tells that the other side has ended.

Guarantee: what is parsed cannot change while it is parsed; waiting is bounded. Not hidden: anything, from this user's other processes, who
could read a socket's traffic just as well. Source: futexes (futex(7)); the lane is ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import itertools
import mmap
import os
import socket
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cloven.wire.limits import MAX_HEADER_BYTES

CAPACITY = 4 * 2**20  # bytes of one payload, either way
CLIENT, SERVER = 0, 1  # who writes: the request, the answer
INTERFACE = 3  # of the library
PREFIX = "cloven-"
PREFIX_BYTES = 8  # of a call without a header
_PEER = "3i"  # struct ucred
_BOX = MAX_HEADER_BYTES + CAPACITY
_FIRST = 256
_SIZE = _FIRST + 2 * _BOX
_WORDS = (16, 32)  # index of a side's number; the lengths of its header and payload follow
_ZEROS = memoryview(bytes(CAPACITY))
_generations = itertools.count(1)  # of all lanes of the process: a step never goes on in another lane
Frame = bytes | memoryview


class LaneGone(Exception):
    """The lane cannot be used any more; the socket can."""


@cache
def _bell() -> Any:
    """The compiled library, or None where it was not built."""
    found = importlib.util.find_spec("cloven.wire.native._bell")
    if found is None or found.origin is None or sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(found.origin)
        if library.cloven_bell_interface() != INTERFACE:
            return None
        library.cloven_bell_ring.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        library.cloven_bell_call.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int64]
        library.cloven_bell_raw.argtypes = [*(ctypes.c_void_p, ctypes.c_uint32) * 3, ctypes.c_int64, ctypes.c_int64]
        library.cloven_bell_ask.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint32]
        library.cloven_bell_wait.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int64]
        library.cloven_bell_wait.restype = ctypes.c_int
    except (OSError, AttributeError):  # built for another machine, or another version
        return None
    return library


def lanes_available() -> bool:
    """Whether this process can share memory with another: Linux, the library, and nobody said CLOVEN_LANES=0."""
    return _bell() is not None and hasattr(os, "memfd_create") and os.environ.get("CLOVEN_LANES", "1") != "0"


@contextlib.contextmanager
def short_path(folder: Path, name: str) -> Iterator[str]:
    """A path to `name` in a folder that fits a Unix socket's 107 bytes, however long the folder's own path is."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def fits(frames: list[Frame], expected: int | None) -> bool:
    """Whether a request and its answer of `expected` payload bytes (None: not known) go through a lane."""
    return expected is not None and expected <= CAPACITY and sum(memoryview(frame).nbytes for frame in frames[1:]) <= CAPACITY


class Lane:
    """One side's end of a lane.

    Args:
        descriptor: of the shared memory; it is closed here.
        side: CLIENT or SERVER.
        connection: to the other side's process; the lane closes it.

    Raises:
        LaneGone: that is not what a lane is made of.
    """

    def __init__(self, descriptor: int, side: int, connection: socket.socket) -> None:
        self._side, self._other, self._connection, self._pid = side, 1 - side, connection, os.getpid()
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _seals() != _seals() or os.fstat(descriptor).st_size != _SIZE:
                raise LaneGone("memory of another size, or that could be truncated")
            self._map = mmap.mmap(descriptor, _SIZE)
        except (OSError, ValueError) as error:
            raise LaneGone(f"not a lane: {error}") from error
        finally:
            os.close(descriptor)
        connection.setblocking(False)
        if hasattr(mmap, "MADV_DONTFORK"):
            self._map.madvise(mmap.MADV_DONTFORK)
        whole = memoryview(self._map)
        self._words = whole[:_FIRST].cast("I")
        self._boxes = [whole[_FIRST + box * _BOX : _FIRST + (box + 1) * _BOX] for box in range(2)]
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._bells = [self._start + 4 * word for word in _WORDS]
        self._seen = 0
        self._due = False  # a message is written, the bell not yet rung
        self.generation = next(_generations)  # of messages with a header: a step lasts until the next one
        self._library = _bell()

    @classmethod
    def offered(cls, connection: socket.socket) -> Lane:
        """The server's end: makes the memory and passes it on.

        Raises:
            LaneGone: no memory, another user's process, or nobody there any more.
        """
        try:
            _require_own(connection)
            descriptor = os.memfd_create("cloven-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise LaneGone(f"no shared memory: {error}") from error
        try:
            os.posix_fallocate(descriptor, 0, _SIZE)  # now or never: memory that is missing later is a signal that kills
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
            socket.send_fds(connection, [b"lane"], [descriptor])
        except OSError as error:
            os.close(descriptor)
            raise LaneGone(f"no shared memory: {error.strerror}") from error
        return cls(descriptor, SERVER, connection)

    @classmethod
    def taken(cls, connection: socket.socket) -> Lane:
        """The client's end of a lane that a server passes over a connection.

        Raises:
            LaneGone: nothing came, or no lane.
        """
        try:
            _require_own(connection)
            _, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
        except OSError as error:
            raise LaneGone(f"no shared memory: {error}") from error
        if len(descriptors) != 1:
            raise LaneGone("no shared memory came")
        return cls(descriptors[0], CLIENT, connection)

    def send(self, frames: list[Frame]) -> None:
        """Write a message of this side, for `ring` or `receive` to ring: a request has the next number, an answer the last request's."""
        box, word = self._boxes[self._side], _WORDS[self._side]
        self._require_process()
        header, *payload = frames
        box[: len(header)] = header
        end = MAX_HEADER_BYTES
        for piece in (memoryview(frame).cast("B") for frame in payload):
            box[end : end + piece.nbytes] = piece
            end += piece.nbytes
        self._words[word + 1] = len(header)
        self._words[word + 2] = end - MAX_HEADER_BYTES + 1 if payload else 0
        if self._side == CLIENT:
            self._seen = (self._seen + 1) & 0xFFFFFFFF
        self._due = True
        self.generation = next(_generations)

    def ring(self) -> None:
        """Wake the other side for what `send` wrote, without waiting for it."""
        if self._due:
            self._due = False
            self._library.cloven_bell_ring(self._bells[self._side], self._seen)

    def ask(self, prefix: int, x: int, size: int) -> None:
        """Send the first half of a call without a header: eight bytes, then `size` bytes at x; `raw` with `again` waits for the answer.

        Raises:
            LaneGone: it does not fit.
        """
        self._require_process()
        self._seen = (self._seen + 1) & 0xFFFFFFFF
        if self._library.cloven_bell_ask(self._start, self._seen, prefix, x, size):
            raise LaneGone("a request that does not fit")

    def raw(self, x: int, size: int, out: int, out_size: int, seconds: float, awake: float, *, again: bool) -> bool:
        """A client's call without a header: `size` bytes at x go, `out_size` bytes come to `out`.

        Args:
            awake: seconds of these that this thread looks without sleeping.
            again: it was sent by a call that returned False; look once more.

        Returns:
            Whether the answer came within so many seconds.

        Raises:
            LaneGone: something else came.
        """
        self._require_process()
        if not again:
            self._seen = (self._seen + 1) & 0xFFFFFFFF
        patience = max(0, int(1e9 * seconds)), int(1e9 * awake)
        came = self._library.cloven_bell_raw(self._start, self._seen, None if again else x, size, out, out_size, *patience)
        if came < 0:
            raise LaneGone("an answer of another kind")
        return bool(came)

    @contextlib.contextmanager
    def handed_over(self, state: Any) -> Iterator[int]:
        """The server's end in the hands of C++, which goes on with `state.seen` and `state.due`: gives the address of the memory."""
        state.seen, state.due, self._due = self._seen, int(self._due), False
        try:
            yield self._start
        finally:
            self._seen = state.seen

    def receive(self, seconds: float) -> list[Any] | None:
        """The other side's message, as private copies of its frames: the answer to the request sent last, or the next request.

        Returns:
            None where there is none within so many seconds, or a signal came.

        Raises:
            LaneGone: its lengths are impossible.
        """
        self._require_process()
        word = _WORDS[self._other]
        expected = (self._seen - 1) & 0xFFFFFFFF if self._side == CLIENT else self._seen
        nanoseconds, other = max(0, int(1e9 * seconds)), self._bells[self._other]
        if self._due:
            self._due = False
            came = self._library.cloven_bell_call(self._bells[self._side], self._seen, other, expected, nanoseconds)
        else:
            came = self._library.cloven_bell_wait(other, expected, nanoseconds)
        if not came:
            return None
        number, header, payload = self._words[word : word + 3]
        if (self._side == CLIENT and number != self._seen) or header > MAX_HEADER_BYTES or payload > CAPACITY + 1:
            raise LaneGone("an impossible number or length")
        self._seen = number
        box = self._boxes[self._other]
        frames: list[Any] = [bytes(box[:header])]
        box[:header] = _ZEROS[:header]
        if payload:
            end = MAX_HEADER_BYTES + payload - 1
            frames.append(bytearray(box[MAX_HEADER_BYTES:end]))
            box[MAX_HEADER_BYTES:end] = _ZEROS[: payload - 1]
        return frames

    def other_is_gone(self) -> bool:
        """Whether no process holds the other end."""
        try:
            return self._connection.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Give this end up; who waits at the other one sees that at once."""
        if os.getpid() == self._pid:
            self.ring()
            self._connection.close()
            self._library.cloven_bell_ring(self._bells[self._side], self._words[_WORDS[self._side]])

    def _require_process(self) -> None:
        """A forked child would take its parent's answers."""
        if os.getpid() != self._pid:
            raise LaneGone("this process was forked from the one that holds the lane")


def _seals() -> int:
    return int(fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _require_own(connection: socket.socket) -> None:
    _, user, _ = struct.unpack(_PEER, connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_PEER)))
    if user != os.getuid():
        raise LaneGone("another user's process")
