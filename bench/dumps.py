"""What XLA made of a program on the GPU that is present: registers and spills of its kernels, its CUDA graphs."""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def dumped(lowered: jax.stages.Lowered, **options: Any) -> Iterator[tuple[jax.stages.Compiled, str]]:
    """Compiles a program and keeps what the compiler tells about it, as `pallas_kernels.targets.compile_for` does.

    Args:
        lowered: the program.
        **options: of XLA, by name.

    Yields:
        The compiled program, and the folder for `read_resources` and `read_schedule`.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update(name, math.inf)  # out of the cache it would come without a dump the next time
        try:
            # XLA takes its flags by name. The second is a pattern: newer versions dump PTX only where it asks for it.
            options |= {"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
            yield lowered.compile(compiler_options=options), folder
        finally:
            jax.config.update(name, before)
