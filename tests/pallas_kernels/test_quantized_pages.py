"""Pages of one byte an element from write to attention: how far the result is from that of pages in full precision."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import BACKENDS, answers, assert_exact, make_batch, plain_attention, rms, run

from pallas_kernels import dispatch
from pallas_kernels.ragged_paged_attention import quantized, ragged_paged_attention
from pallas_kernels.rotary_page_write import rotary_page_write
from pallas_kernels.targets import compile_for, entry_instructions, large_copies, memory

# Relative error of attention over normal data: that of the format, as the weights average what the values have.
ERRORS = {"int8": 1e-2, "float8_e4m3fn": 4e-2, "float8_e5m2": 8e-2}


@functools.partial(jax.jit, static_argnames=("stored", "implementation"))
def written(keys, values, stored, implementation):
    """Pools `[P, K, p, H]` as the page write quantizes them, as keywords of attention."""
    (pages, heads, size, _), empty = keys.shape, jnp.zeros(keys.shape, stored)
    rows = jnp.concatenate([jnp.zeros_like(keys[:, :1]), keys, values], axis=1).swapaxes(1, 2)
    place = jnp.divmod(jnp.arange(pages * size, dtype=jnp.int32), size)
    scales = {name: jnp.zeros((pages, heads, size)) for name in ("key_scales", "value_scales")}
    rows = rows.reshape(pages * size, 1 + 2 * heads, -1)
    out = rotary_page_write(rows, empty, empty, *place, **scales, implementation=implementation)
    return {name: getattr(out, name) for name in ("key_pages", "value_pages", *scales)}


def as_written(batch, stored, implementation="xla"):
    """The batch with its pools quantized, and what they were in float32."""
    plain = batch | {name: jnp.nan_to_num(batch[name]) for name in ("key_pages", "value_pages")}
    return batch | written(plain["key_pages"], plain["value_pages"], stored, implementation), plain


@pytest.mark.parametrize(
    ("implementation", "stored"),
    [
        ("triton", "int8"),
        ("triton", "float8_e4m3fn"),
        ("xla", "int8"),
        ("xla", "float8_e5m2"),
        ("reference", "float8_e4m3fn"),
    ],
)
def test_error_of_attention(implementation, stored, rng):
    """Written and attended over by one backend, against float64 over what was never quantized."""
    batch = make_batch(rng, (4, 2, 64), [1, 9, 1], [300, 70, 33])
    batch, plain = as_written(batch, stored, implementation)
    out, lse = run(batch, return_lse=True, implementation=implementation)
    exact, exact_lse = plain_attention(plain)
    error = rms(out - exact) / rms(exact)
    assert ERRORS[stored] / 5 < error < ERRORS[stored]
    assert abs(lse - exact_lse).max() < 2 * ERRORS[stored]
    assert_exact((out, lse), batch, answers(batch))


@pytest.mark.parametrize(
    ("implementation", "stored"),
    [("triton", "int8"), ("triton", "float8_e5m2"), ("xla", "float8_e4m3fn"), ("xla", "float8_e5m2")],
)
def test_small_weights_in_float16(implementation, stored, rng):
    """Many keys of weight `exp(-9)`, times scales down to 1 / 57344: together they are a fifth of the sum."""
    batch = make_batch(rng, (1, 1, 32), [1], [2048], page_size=128, dtype=jnp.float16)
    q = np.asarray(batch["q"], np.float64)[0, 0]
    keys = np.zeros(batch["key_pages"].shape)
    keys[batch["page_table"][0, 0], 0, 0] = 9 * q / (q @ q)
    batch["key_pages"], batch["value_pages"] = jnp.asarray(keys, jnp.float32), 1 + batch["value_pages"] / 8
    batch, _ = as_written(batch, stored)
    out = run(batch, scale=1.0, max_q_len=1, implementation=implementation)
    exact, _ = plain_attention(batch, scale=1.0)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=1e-3)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_holes_behind_the_window(implementation, rng):
    """Pages that no query sees any more may be anyone's, their scales too."""
    batch = make_batch(rng, (4, 2, 32), [1, 5], [100, 90], stored=jnp.float8_e4m3fn)
    expected = answers(batch, window=20)
    table = np.array(batch["page_table"])
    table[:, :4] = [[-1], [10**6]]
    batch["page_table"] = jnp.asarray(table)
    assert_exact(run(batch, window=20, implementation=implementation), batch, expected)


def test_latent_pages(rng):
    """One vector that is key and value, of more columns than the kernels take: plain XLA has it."""
    batch = make_batch(rng, (4, 1, 576), [1, 3], [40, 20], dtype=jnp.bfloat16, stored=jnp.int8)
    batch |= {f"value_{name}": batch[f"key_{name}"] for name in ("pages", "scales")}
    assert_exact(run(batch, implementation="xla"), batch, answers(batch))
    with pytest.raises(dispatch.UnsupportedError, match="head size 576 is above 256"):
        run(batch, implementation="triton")


@pytest.mark.parametrize(("tokens", "max_q_len"), [(8, 1), (64, None)])
def test_best_backend_of_hopper(tokens, max_q_len):
    """Triton, for prompts too, and whatever the size of the pool; Mosaic says why not."""
    pages = jax.ShapeDtypeStruct((3 * 2**30 // (8 * 64 * 128), 8, 64, 128), jnp.int8)
    scales = jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32)
    table, starts, lens = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 4), (9,), (8,)))
    arrays = jax.ShapeDtypeStruct((tokens, 32, 128), jnp.bfloat16), pages, pages, table, starts, lens

    def lowered(implementation=None):
        fn = functools.partial(ragged_paged_attention, max_q_len=max_q_len, implementation=implementation)
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=device)):
            traced = jax.jit(fn).trace(*arrays, key_scales=scales, value_scales=scales)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert "paged_decode" in lowered()
    assert ("paged_prefill" in lowered()) == (max_q_len is None)
    with pytest.raises(dispatch.UnsupportedError, match="pages are int8, not bfloat16 as the queries"):
        lowered("mosaic")


def test_lifts_are_those_of_the_formats():
    for dtype, bits in quantized.LIFT.items():
        largest = 127 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
        assert 2.0**bits / 2 < largest < 2.0**bits * 2


@pytest.mark.parametrize("num_pages", [4_000, 48_000])  # the second are 2.9 GiB a pool, which take words to write
def test_a_layer_is_in_place(gpu_compiler, num_pages):
    """Written and read in one program, pools are seen as bytes and as words, and never copied."""
    pool = jax.ShapeDtypeStruct((num_pages, 8, 64, 128), jnp.float8_e4m3fn)
    scale = jax.ShapeDtypeStruct(pool.shape[:3], jnp.float32)
    qkv = jax.ShapeDtypeStruct((32, 48, 128), jnp.bfloat16)
    place, table, starts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((32,), (32, 16), (33,)))

    def layer(pools, qkv, place, table, starts):
        q, *pools = rotary_page_write(qkv, *pools[:2], place, place, key_scales=pools[2], value_scales=pools[3])
        scales = {"key_scales": pools[2], "value_scales": pools[3]}
        out = ragged_paged_attention(q, *pools[:2], table, starts, place, **scales, max_q_len=1)
        return out, tuple(pools)

    pools = pool, pool, scale, scale
    compiled = compile_for(layer, pools, qkv, place, table, starts, donate_argnums=0)
    nbytes = [math.prod(x.shape) * x.dtype.itemsize for x in pools]
    assert memory(compiled).alias == sum(nbytes)
    assert large_copies(compiled, nbytes[2]) == []
    kernels = [each for each in entry_instructions(compiled) if each.opcode == "custom-call"]
    assert len(kernels) == 2
