"""A shell session of `cloven` commands, each in a process forked from one that has imported what most of them need: seconds each are saved.

As a script: reads the session from standard input. Knows `$PWD`, quotes and a `&` at a line's end, and nothing else of a shell; ends with
the first exit code that is not 0, and ends what runs in the background.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from types import FrameType

import torch


def forked(words: list[str]) -> int:
    """Start a command: its process id."""
    from cloven.cli.main import run

    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = words
    run()
    sys.exit(0)  # as a command of its own would end


def main() -> int:
    """Runs the session: its exit code."""
    import transformers

    import cloven.cluster.adapter_process
    import cloven.slip.session
    import cloven.worker.service

    del cloven
    assert transformers.AutoModelForCausalLM and transformers.AutoTokenizer  # imported when they are first asked for
    assert torch.get_num_threads()  # nothing has run that would start its threads
    gc.freeze()  # or every command would tidy up all that was imported at its end
    background: list[int] = []
    parent = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        for line in sys.stdin.read().splitlines():
            words = [os.path.expandvars(word) for word in shlex.split(line)]
            assert words[0] == "cloven" and not any(sign in line for sign in "|;<>`("), f"not known here: {line}"
            if words[-1] == "&":
                background.append(forked(words[:-1]))
                continue
            code = os.waitstatus_to_exitcode(os.waitpid(forked(words), 0)[1])
            if code:
                return code
    finally:
        for pid in background if os.getpid() == parent else []:  # what was forked leaves here, too
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
