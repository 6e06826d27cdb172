"""What prefix caching saves: prompts that share none, half, or nine tenths of their tokens; and what a lookup costs.

    python -m bench.prefix --json bench/results/prefix.json

Two engines with the same parameters, one with prefix caching and one without, answer the same requests in turns (A B A
B). An update of the parameters empties the cache before each round, so each begins cold. The model is random, of
SmolLM2-135M's widths.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import dsjax
from bench.environment import environment
from bench.shapes import SHAPES
from dsjax.ragged.page_table import KEY_WORDS, Contents
from dsjax.ragged.prefix import Prefixes

SHARES = (0.0, 0.5, 0.9)
CACHED = (1_000, 10_000, 100_000, 1_000_000)
LOOKUPS = 16, 128  # texts, pages of each


def model(layers: int) -> dsjax.Params:
    """Random parameters of SmolLM2-135M's widths."""
    config = dataclasses.replace(SHAPES["smollm2-135m"], num_layers=layers)
    return jax.jit(dsjax.prepare)(dsjax.init(config, jax.random.key(0)))


def prompts(share: float, count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids; the first `share` of each prompt is the same."""
    draw = np.random.default_rng(seed)
    same = draw.integers(0, 49_152, round(share * length)).tolist()
    return [same + draw.integers(0, 49_152, length - len(same)).tolist() for _ in range(count)]


def measure_shares(args: argparse.Namespace) -> list[dict]:
    """Seconds of each engine for each share, in turns."""
    params = model(args.layers)
    engines = {
        name: dsjax.Engine(
            params,
            slots=8,
            token_budget=args.budget,
            max_context=args.length + 64,
            pages=args.pages,
            prefix_caching=name == "on",
        )
        for name in ("on", "off")
    }
    settings = dsjax.SamplingParams(max_tokens=args.new, temperature=0.0, ignore_eos=True)
    results = []
    for share in SHARES:
        batch = prompts(share, args.requests, args.length, seed=round(100 * share))
        seconds = {name: [] for name in engines}
        hits, tokens = 0.0, {}
        for _ in range(args.rounds):
            for name, engine in engines.items():
                engine.update(engine.params)
                before = engine.stats()
                begin = time.perf_counter()
                outputs = engine.generate(batch, settings)
                seconds[name].append(time.perf_counter() - begin)
                tokens[name] = [output.outputs[0].token_ids for output in outputs]
                if name == "on":
                    computed = engine.stats()["prompt_tokens"] - before["prompt_tokens"]
                    hits = 1 - computed / (args.requests * args.length)
        ratios = [off / on for on, off in zip(seconds["on"], seconds["off"], strict=True)]
        result = {
            "share": share,
            "seconds": seconds,
            "speed_up": statistics.median(ratios),
            "hit_rate": hits,
            "same_tokens": tokens["on"] == tokens["off"],
        }
        results.append(result)
        print(
            f"{share:4.0%} shared: {result['speed_up']:.3f} times as fast ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"{hits:.0%} of prompt tokens found, tokens {'equal' if result['same_tokens'] else 'DIFFER'}"
        )
    return results


def measure_lookup(cached: int, repeats: int) -> float:
    """Median microseconds to look up `LOOKUPS` pages among so many that are cached."""
    prefixes, contents = Prefixes.empty(1, 1, cached), Contents.empty(cached)
    draw = np.random.default_rng(0)
    keys = jnp.asarray(draw.integers(1, 2**32, (cached, KEY_WORDS), np.uint32))
    insert = jax.jit(Prefixes.insert, donate_argnums=(0, 1))
    for begin in range(0, cached, 1000):
        pages = jnp.arange(begin, min(begin + 1000, cached), dtype=jnp.int32)
        prefixes, contents = insert(prefixes, contents, pages, keys[pages])

    @functools.partial(jax.jit, static_argnames="rounds")
    def look(prefixes, contents, wanted, rounds):
        def one(i, total):
            return total + prefixes.lookup(contents, jnp.roll(wanted, i, axis=0))

        return jax.lax.fori_loop(0, rounds, one, jnp.zeros(LOOKUPS, jnp.int32))

    wanted = keys[draw.integers(0, cached, LOOKUPS)]
    found = np.asarray(look(prefixes, contents, wanted, 1))
    assert (found < cached).mean() > 0.99, "almost every page is found"
    rounds, seconds = 50, []
    look(prefixes, contents, wanted, rounds)
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(look(prefixes, contents, wanted, rounds))
        seconds.append((time.perf_counter() - begin) / rounds)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=6, help="of the model (default %(default)s)")
    add("--requests", type=int, default=24, help="in a round (default %(default)s)")
    add("--length", type=int, default=640, help="tokens of a prompt (default %(default)s)")
    add("--new", type=int, default=4, help="tokens generated (default %(default)s)")
    add("--budget", type=int, default=128, help="tokens of a step that reads prompts (default %(default)s)")
    add("--pages", type=int, default=400, help="in the pool (default %(default)s)")
    add("--rounds", type=int, default=5, help="of each engine (default %(default)s)")
    add("--json", type=pathlib.Path, help="write the result to this file")
    args = parser.parse_args()
    shares = measure_shares(args)
    lookups = []
    for cached in CACHED:
        lookups.append({"cached": cached, "microseconds": measure_lookup(cached, args.rounds)})
        texts, pages = LOOKUPS
        print(
            f"{cached:9,} pages cached: {lookups[-1]['microseconds']:.1f} us to look up {texts} texts of {pages} pages"
        )
    if args.json:
        record = {"environment": environment(("jax", "numpy")), "shares": shares, "lookups": lookups}
        args.json.write_text(json.dumps(record, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
