"""Random traces without end: engines with tiny pools, whatever may happen to a request, and every answer compared.

Each round draws new requests, computes what they give alone, and plays traces of them on each engine. The first thing
that is not as it should be ends the command with the trace that shows it. Reports counts.

    python -m bench.soak --seconds 600 --seed 1
"""

import argparse
import collections
import json
import time

import jax
import numpy as np

import dsjax
from bench import traces

KINDS = 96  # of requests, in a round
TRACES = 40  # of an engine, in a round


def count_compilations() -> list[str]:
    """A list that gets the name of every program that the backend compiles from now on."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


def soak(seconds: float, seed: int, names: list[str]) -> collections.Counter[str]:
    """Play traces for so long; returns what happened."""
    engines: dict[str, dsjax.Engine] = {}
    counts: collections.Counter[str] = collections.Counter()
    begin, round_number = time.monotonic(), 0
    compiled = count_compilations()
    while time.monotonic() - begin < seconds:
        pools = {
            window: traces.Pool(1_000_000 * seed + round_number, KINDS, window)
            for window in {name == "window" for name in names}
        }
        for name in names:
            is_new = name not in engines
            if is_new:
                engines[name] = traces.make_engine(name)
            player = traces.Player(engines[name], pools[name == "window"])
            player.pool.answers(1)
            if is_new:
                player.play(rare(player.pool, holds=True))
            rng = np.random.default_rng([seed, round_number, names.index(name)])
            before = len(compiled)
            for number in range(TRACES):
                events = traces.random_events(rng, KINDS, holds=bool(rng.random() < 0.3))
                try:
                    player.play(events)
                except BaseException:
                    print(f"seed {seed}, round {round_number}, engine {name}, trace {number}: {events}", flush=True)
                    raise
            counts["compilations"] += len(compiled) - before
            if len(compiled) > before:
                print(f"engine {name} compiled {compiled[before:]}", flush=True)
            player.close()
            counts.update(player.counts)
            seconds_so_far = round(time.monotonic() - begin)
            print(json.dumps({"seconds": seconds_so_far, "round": round_number, "engine": name, **counts}), flush=True)
        round_number += 1
    return counts


def rare(pool: traces.Pool, holds: bool = False) -> list[tuple]:
    """A trace that uses what is compiled by those who use it: processors in every slot, new pages, sequences held."""
    with_processor = [i for i, kind in enumerate(pool.kinds) if "logits_processor" in kind.settings]
    adds = [("add", i, traces.SAMPLES) for i in with_processor * 2]
    held = [("hold", 0, 0, 2), ("hold", 0, 0, 1)] if holds else []
    return [*adds, ("step", 8), ("retake",), *held]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="+", default=list(traces.ENGINES), choices=list(traces.ENGINES))
    options = parser.parse_args()
    soak(options.seconds, options.seed, options.engines)


if __name__ == "__main__":
    main()
