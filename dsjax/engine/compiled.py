"""The engine's programs, compiled ahead of time but for a few that are seldom used."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tqdm.std import tqdm

from dsjax.config import ModelConfig
from dsjax.engine import programs
from dsjax.engine.programs import Sizes
from dsjax.params import Params
from dsjax.ragged.state import Queue, State
from dsjax.sharding import named_sharding

# Programs that run for every engine, first those that make queue and state; the others are compiled by who uses them.
_MAKERS = ("empty_queue", "empty_state")
_ALWAYS = (*_MAKERS, "submit", "constrain", "read", "decode")
_RARE = ("read_plain", "decode_plain")


class Programs:
    """Compiled programs of one architecture and size. Engines of one kind share them.

    Args:
      shapes: the parameters, or their shapes and shardings.
      sizes: what to compile for.
    """

    def __init__(self, shapes: Params, sizes: Sizes):
        self.config: ModelConfig = shapes.config
        self.sizes = sizes
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shapes)
        self._small, self._pages = _places(self._params)
        self._compiled: dict[str, Any] = {}
        self._lock = threading.Lock()
        config = self.config
        queue = jax.eval_shape(lambda: programs.empty_queue(config, sizes))
        state = jax.eval_shape(lambda: programs.empty_state(config, sizes))
        self.queue_shapes: Queue = self._placed(queue)
        self.state_shapes: State = self._placed(state)

    def _placed(self, tree: Any) -> Any:
        """Shapes with the shardings that the engine keeps them in: pages by heads, all else on every device."""

        def one(path, x):
            in_pages = any(getattr(key, "name", None) == "pages" for key in path)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._pages(x.shape) if in_pages else self._small)

        return jax.tree_util.tree_map_with_path(one, tree)

    def _jobs(self) -> dict[str, Callable[[], tuple[Callable, tuple, tuple[int, ...], Any]]]:
        """What gives of each program the function, arguments, which of them are donated, and where results go."""
        sizes, config = self.sizes, self.config
        queue, state = self.queue_shapes, self.state_shapes
        of = functools.partial(jax.tree.map, lambda x: x.sharding)

        def small(*shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._small)

        packet = programs.packet_dtype(sizes).itemsize // 4
        submit = (
            queue,
            state,
            small(sizes.rows, packet),
            small(3, sizes.packet_tokens),
            small(sizes.packet_prompts),
            small(dtype=jax.random.key(0).dtype),
        )
        words = self.queue_shapes.sampling.allowed
        assert words is not None
        constrain = (
            queue,
            small(),
            small(sizes.biased_tokens),
            small(sizes.biased_tokens, dtype=jnp.float32),
            small(words.shape[1], dtype=jnp.uint32),
        )

        def step(decodes: bool, full: bool):
            function = functools.partial(programs.call, sizes=sizes, decodes=decodes, full=full)
            return function, (self._params, queue, state), (2,), (of(state), self._small, self._small)

        def put(decodes: bool):
            tokens = sizes.slots if decodes else sizes.token_budget
            batch = {name: small(tokens) for name in ("tokens", "positions", "slot_of_token")}
            batch |= {"cu_q_lens": small(sizes.slots + 1), "new_pages": small(sizes.slots)}
            function = functools.partial(programs.compute, sizes=sizes, decodes=decodes)
            return function, (self._params, state, batch), (1,), (of(state), self._small)

        look = functools.partial(programs.look, sizes=sizes)

        def conclude():
            _, batch, logits, _ = jax.eval_shape(look, self._params, queue, state)
            batch, logits = jax.tree.map(lambda x: small(*x.shape, dtype=x.dtype), (batch, logits))
            function = functools.partial(programs.conclude, sizes=sizes)
            return function, (queue, state, batch, logits, logits), (1,), (of(state), self._small, self._small)

        salts = small(sizes.rows, dtype=jnp.uint32)
        text = small(sizes.rows, sizes.max_context)
        return {
            "empty_queue": lambda: (lambda: programs.empty_queue(config, sizes), (), (), of(queue)),
            "empty_state": lambda: (lambda: programs.empty_state(config, sizes), (), (), of(state)),
            "submit": lambda: (
                functools.partial(programs.submit, sizes=sizes),
                submit,
                (0, 1),
                (of(queue), of(state)),
            ),
            "constrain": lambda: (programs.constrain, constrain, (0,), of(queue)),
            "read": lambda: step(decodes=False, full=True),
            "decode": lambda: step(decodes=True, full=True),
            "read_plain": lambda: step(decodes=False, full=False),
            "decode_plain": lambda: step(decodes=True, full=False),
            "look": lambda: (look, (self._params, queue, state), (2,), (of(state), *(self._small,) * 3)),
            "conclude": conclude,
            "put": lambda: put(decodes=False),
            "put_one": lambda: put(decodes=True),
            "flush": lambda: (programs.flush, (state, small(sizes.slots, dtype=jnp.bool_)), (0,), of(state)),
            "restart": lambda: (
                functools.partial(programs.restart, sizes=sizes),
                (state, text, small(sizes.rows), salts),
                (0,),
                of(state),
            ),
        }

    def warm_up(
        self, bar: tqdm | None = None, names: tuple[str, ...] | None = None, *, everything: bool = False
    ) -> None:
        """Compile programs, by default all that ordinary requests need.

        Args:
          bar: shows how many are ready.
          names: which.
          everything: all that there are, in place of `names`.
        """
        usual = _ALWAYS + (() if self.sizes.always_full else _RARE)
        if everything:
            names = tuple(name for name in self._jobs() if name in usual or name not in _RARE)
        elif names is None:
            names = usual
        with self._lock:
            missing = [name for name in names if name not in self._compiled]
            if not missing:
                return
            jobs = self._jobs()
            if bar is not None:
                bar.total = len(missing)

            def one(name: str):
                function, arguments, donated, places = jobs[name]()
                return self.build(jax.jit(function, donate_argnums=donated, out_shardings=places), arguments)

            # Tracing holds Python's lock, XLA's compiler does not.
            with ThreadPoolExecutor(4) as pool:
                for name, program in zip(missing, pool.map(one, missing), strict=True):
                    self._compiled[name] = program
                    if bar is not None:
                        bar.update()

    def build(self, function: Any, arguments: tuple) -> Any:
        """Compile a jitted function, on the devices that the shapes are for."""
        return function.lower(*arguments).compile()

    @property
    def num_compiled(self) -> int:
        """Programs there are."""
        return len(self._compiled)

    def temporaries(self) -> int:
        """Most bytes on a device that any compiled program needs beside parameters, queue and state."""
        most = 0
        for name, program in self._compiled.items():
            memory = program.memory_analysis()
            if memory is not None:
                # What the first two give is the queue and the state.
                new = 0 if name in _MAKERS else memory.output_size_in_bytes - memory.alias_size_in_bytes
                most = max(most, memory.temp_size_in_bytes + max(new, 0))
        return most

    def run(self, name: str, *arguments: Any) -> Any:
        """Run a program; compiles it if it is one of the rare ones and this is its first use."""
        if name not in self._compiled:
            self.warm_up(names=(name,))
        return self._compiled[name](*arguments)

    def call(self, params: Params, queue: Queue, state: State, *, decodes: bool, full: bool):
        """One call of the device; see `programs.call`."""
        name = "decode" if decodes else "read"
        return self.run(name if full or self.sizes.always_full else f"{name}_plain", params, queue, state)

    def put(self, value: Any) -> Any:
        """A host's array or tree of arrays on the devices."""
        return jax.device_put(value, self._small)

    def fetch(self, value: Any) -> Any:
        """Arrays of the devices on the host; waits for them."""
        return jax.tree.map(np.asarray, value)


def _places(shapes: Params):
    """Where small arrays live, and a function that says where pages of a shape do."""
    sharding = jax.tree.leaves(shapes)[0].sharding
    if not isinstance(sharding, NamedSharding):
        device = next(iter(sharding.device_set))
        return SingleDeviceSharding(device), lambda shape: SingleDeviceSharding(device)
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    axes = ("positions", "kv_heads", "positions", "head")
    return NamedSharding(mesh, PartitionSpec()), lambda shape: named_sharding(mesh, axes, shape)


@functools.lru_cache(maxsize=8)
def _shared(treedef: Any, leaves: tuple, sizes: Sizes) -> Programs:
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in leaves]
    return Programs(jax.tree.unflatten(treedef, shapes), sizes)


def programs_for(params: Params, sizes: Sizes) -> Programs:
    """The programs for parameters of these shapes, shared with other engines of the same kind."""
    leaves, treedef = jax.tree.flatten(params)
    return _shared(treedef, tuple((x.shape, x.dtype, x.sharding) for x in leaves), sizes)
