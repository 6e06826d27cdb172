"""What the host does for each call of the device: microseconds by running and by waiting requests.

The device is a stand-in that answers at once with a token for every running request; its own time is taken off. So
what is left is the engine's loop: reading outputs, keeping count, ending and beginning requests, making packets.

    python -m bench.host_cost --json bench/results/host_cost.json
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from typing import Any

import numpy as np

from bench.environment import environment
from dsjax.config import ModelConfig
from dsjax.engine.core import Core
from dsjax.engine.programs import FLAGS, STATUS, Sizes, packet_dtype
from dsjax.engine.requests import Request, new_metrics
from dsjax.engine.sampling_params import SamplingParams
from dsjax.ragged.groups import PageGroups
from dsjax.ragged.state import Finish

RUNNING = (64, 256, 1024, 2048)
WAITING = (0, 100, 10_000)
PROMPT, CONTEXT = 16, 4096
GOAL = 150.0, 1.5  # microseconds: for a call, and for each running request

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=32_000,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_context=CONTEXT,
)


class FakeDevice:
    """Runs as many rows as there are slots, first come first served; each gets a token a call, and some end."""

    config = CONFIG

    def __init__(self, slots: int, finishing: float):
        self.sizes = Sizes(
            slots=slots,
            rows=2 * slots,
            pages=1 << 20,
            page_size=64,
            groups=PageGroups(),
            token_budget=max(512, slots),
            max_context=CONTEXT,
            steps_per_sync=1,
            packet_tokens=4 * max(512, slots),
            packet_prompts=64,
            stop_ids=16,
            biased_tokens=8,
            alternatives=20,
            kv_dtype="bfloat16",
            prefix_caching=True,
            split_fuse=True,
            always_full=False,
            implementation=None,
        )
        self.seconds = 0.0
        self._finishing = finishing
        self._draw = np.random.default_rng(0)
        self._slots = np.full(slots, self.sizes.rows, np.int32)
        self._queue: list[int] = []

    def put(self, value: Any) -> Any:
        return value

    def run(self, name: str, *arguments: Any) -> Any:
        begin = time.perf_counter()
        if name == "submit":
            rows = arguments[2].reshape(-1).view(packet_dtype(self.sizes))
            self._queue += np.flatnonzero(rows["flags"] & FLAGS["starts"]).tolist()
            self._admit()
        self.seconds += time.perf_counter() - begin
        return ("queue", "state") if name == "submit" else name

    def _admit(self) -> None:
        free = np.flatnonzero(self._slots == self.sizes.rows)[: len(self._queue)]
        self._slots[free] = self._queue[: len(free)]
        del self._queue[: len(free)]

    def call(self, params: Any, queue: Any, state: Any, *, decodes: bool, full: bool):
        begin = time.perf_counter()
        slots = self.sizes.slots
        packed = np.zeros((1, 4, slots), np.int32)
        packed[0, 0] = self._slots
        packed[0, 1] = 7
        ended = (self._slots < self.sizes.rows) & (self._draw.random(slots) < self._finishing)
        packed[0, 3] = np.where(ended, Finish.LENGTH, Finish.RUNNING)
        self._slots[ended] = self.sizes.rows
        self._admit()
        answer = np.concatenate([packed.reshape(-1), np.zeros(len(STATUS) + self.sizes.rows, np.int32)])
        self.seconds += time.perf_counter() - begin
        return state, answer, None


class Params:
    """In place of a parameter tree: the loop asks for nothing but its config."""

    config = CONFIG


def request(number: int) -> Request:
    return Request(
        id=str(number),
        number=number,
        prompt=None,
        tokens=np.ones(PROMPT, np.int32),
        params=SamplingParams(max_tokens=CONTEXT),
        limit=CONTEXT - PROMPT,
        stop_ids=(2,),
        rank=number,
        salt=0,
        metrics=new_metrics(),
        tokenizer=None,
    )


def measure(running: int, waiting: int, finishing: float, calls: int) -> float:
    """Median microseconds of a round of the loop, without the device.

    Args:
      running: slots, all of them busy.
      waiting: requests that the device does not know of.
      finishing: share of the running ones that end in a call; as many arrive.
      calls: rounds measured.
    """
    device: Any = FakeDevice(running, finishing)
    core = Core(Params(), device, seed=0)  # pyright: ignore[reportArgumentType]
    core.queue, core.state = "queue", "state"  # pyright: ignore[reportAttributeAccessIssue]
    number = 0
    for _ in range(2 * running + waiting if waiting else running):
        core.add(request(number))
        number += 1
    for _ in range(20):
        core.advance()
    seconds = []
    for _ in range(calls):
        lacking = 2 * running + waiting if waiting else running
        for _ in range(lacking - core.num_live - core.num_waiting):
            core.add(request(number))
            number += 1
        device.seconds = 0.0
        begin = time.perf_counter()
        core.advance()
        seconds.append(time.perf_counter() - begin - device.seconds)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=300, help="rounds of each measurement (default %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="write the result to this file")
    args = parser.parse_args()
    results = []
    for finishing in (0.0, 0.01):
        for waiting in WAITING:
            for running in RUNNING:
                cost = measure(running, waiting, finishing, args.calls)
                results.append({"running": running, "waiting": waiting, "finishing": finishing, "microseconds": cost})
                goal = GOAL[0] + GOAL[1] * running
                load = f"{running:5} running, {waiting:6} waiting, {finishing:4.0%} end a call"
                print(f"{load}: {cost:8.1f} us (goal {goal:6.0f})")
    steady = [entry for entry in results if not entry["finishing"] and not entry["waiting"]]
    slope, base = np.polyfit([e["running"] for e in steady], [e["microseconds"] for e in steady], 1)
    print(f"fit of the first block: {base:.0f} us + {slope:.3f} us for each running request")
    if args.json:
        record = {"environment": environment(("jax", "numpy")), "results": results, "fit": [base, slope]}
        args.json.write_text(json.dumps(record, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
