"""Compiled programs are kept on disk, so that the next start does not compile them again."""

import jax


def keep_programs() -> None:
    """Turn on JAX's persistent compilation cache, unless the user has chosen a folder for it."""
    from policies.sources import hub

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(hub.cache_folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
