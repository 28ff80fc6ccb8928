"""A contender in a process of its own, which measures what each line of input asks for.

python -m experiments.peers.serve NAME DIRECTORY STARTED
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from experiments.peers import CONTENDERS, Task


def main(name: str, directory: str, started: str) -> None:
    """Answers each line of stdin, a method's name, with a line of JSON.

    The first answer comes unasked, about the first update; `started` is `time.time()`
    just before the process was started.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print apart from the answers

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    _, (module, kind), settings, _ = CONTENDERS[name]
    build = getattr(importlib.import_module(f"experiments.peers.{module}"), kind)
    peer = build(Task.read(Path(directory)), **settings)
    start = time.perf_counter()
    peer.first_step()
    seconds = time.perf_counter() - start
    answer({"seconds": seconds, "since_start": time.time() - float(started)})
    for line in sys.stdin:
        start = time.perf_counter()
        value = getattr(peer, line.strip())()
        answer({"seconds": time.perf_counter() - start, "value": value})


if __name__ == "__main__":
    main(*sys.argv[1:])
