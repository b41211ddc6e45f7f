"""How a worker talks: JSON lines. It loads once, says it is ready, and answers each request with tokens and times.

    request  {"prompts": [[token ids]], "tokens": N}
    reply    {"seconds", "first_seconds", "after", "tokens": [[N ids] a prompt]}   or {"error": sentence}

seconds: from the request until every prompt has its N new tokens; first_seconds: until the last prompt had its first
one; after: tokens that came later than that. One clock for all, in the worker. Standard library only: this file runs
under the Python of every peer.
"""

import ctypes
import json
import os
import sys
import time


def serve(open_engine):
    """open_engine() -> (version, generate); generate(prompts, count) yields [(prompt's index, token)] once a step."""
    die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up between the replies

    def say(body):
        out.write(json.dumps(body) + "\n")
        out.flush()

    try:
        version, generate = open_engine()
    except Exception as error:  # whatever a peer raises is its answer
        return say({"error": sentence(error)})
    say({"version": version})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            say(timed(generate, request["prompts"], request["tokens"]))
        except Exception as error:
            say({"error": sentence(error)})


def timed(generate, prompts, count, clock=time.perf_counter):
    """Runs `generate` to its end and puts times to what it yields."""
    tokens, empty = [[] for _ in prompts], len(prompts)
    start, first, after = clock(), None, 0
    for step in generate(prompts, count):
        now = clock()
        after += len(step) if first is not None else 0
        for index, token in step:
            empty -= not tokens[index]
            tokens[index].append(int(token))
        if first is None and not empty:
            first = now
    if any(len(t) != count for t in tokens):
        raise RuntimeError(f"gave {sorted({len(t) for t in tokens})} tokens a prompt instead of {count}")
    return {"seconds": clock() - start, "first_seconds": first - start, "after": after, "tokens": tokens}


def sentence(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def die_with_parent():
    """A stopped worker would outlive a parent that was killed."""
    try:
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    except (OSError, AttributeError):
        pass
