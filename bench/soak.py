"""Random traces without end: engines with tiny pools, whatever may happen to a request, and every answer compared.

Each round draws new requests, computes what they give alone, and plays traces of them on each engine. The first thing
that is not as it should be ends the command with the trace that shows it. Reports counts.

    python -m bench.soak --seconds 600 --seed 1
"""

import argparse
import json
import time

import jax
import numpy as np

from bench import traces

KINDS = 96  # of requests, in a round
TRACES = 40  # of an engine, in a round


def count_compilations() -> list[str]:
    """A list that gets an entry for every program that the backend compiles from now on."""
    compiled: list[str] = []

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compiled


def soak(seconds: float, seed: int, names: list[str]) -> dict[str, int]:
    """Play traces for so long; returns what happened."""
    engines = {name: traces.make_engine(name) for name in names}
    counts = dict.fromkeys(("traces", "compilations"), 0)
    begin, round_number = time.monotonic(), 0
    compiled = count_compilations()
    warm = False
    while time.monotonic() - begin < seconds:
        pools = {
            window: traces.Pool(1_000_000 * seed + round_number, KINDS, window)
            for window in {name == "window" for name in names}
        }
        for name in names:
            player = traces.Player(engines[name], pools[name == "window"])
            pools[name == "window"].answers(1)
            if not warm:  # programs for processors are compiled by the first request that has one
                player.play(processed(player.pool))
            rng = np.random.default_rng([seed, round_number, names.index(name)])
            before = len(compiled)
            for number in range(TRACES):
                events = traces.random_events(rng, KINDS)
                try:
                    player.play(events)
                except BaseException:
                    print(f"seed {seed}, round {round_number}, engine {name}, trace {number}: {events}", flush=True)
                    raise
            counts["compilations"] += len(compiled) - before
            player.close()
            for what, count in player.counts.items():
                counts[what] = counts.get(what, 0) + count
        warm = True
        round_number += 1
        print(json.dumps({"seconds": round(time.monotonic() - begin), "rounds": round_number, **counts}), flush=True)
    return counts


def processed(pool: traces.Pool) -> list[tuple]:
    """A trace in which every slot comes to have a processor of logits."""
    with_processor = [i for i, kind in enumerate(pool.kinds) if "logits_processor" in kind.settings]
    return [("add", i, traces.SAMPLES) for i in with_processor * 2]


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
