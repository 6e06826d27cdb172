"""Registers, spills, shared memory and tensor cores of compiled kernels."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.compat import mosaic, pltriton, triton_call
from pallas_kernels.resources import kernel_resources
from pallas_kernels.targets import compile_for

TENSOR_CORES = {
    "a100": ("mma.sync", "HMMA"),
    "l4": ("mma.sync", "HMMA"),
    "h200": ("wgmma", "HGMMA"),
    "b200": ("tcgen05.mma", "UTCHMMA"),
}


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def product(x, w, name="product", num_warps=4):
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = pltriton.dot(x_ref[...], w_ref[...]).astype(out_ref.dtype)

    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return triton_call(kernel, x, w, out_shape=out, grid=(1,), name=name, num_warps=num_warps, num_stages=2)


@pytest.mark.parametrize("target", TENSOR_CORES)
def test_triton_kernel(gpu_compiler, target):
    (found,) = kernel_resources(lambda x, w: product(x, w) + 1, struct(128, 64), struct(64, 64), target=target).items()
    name, needs = found
    ptx, sass = TENSOR_CORES[target]
    assert name == "product"
    assert needs.tensor_core_instructions[ptx] > 0
    assert needs.sass is None or needs.sass[sass] > 0
    assert 16 <= needs.registers <= 255
    assert needs.spill_bytes == 0
    assert needs.shared_memory >= 64 * 64 * 2, "operands pass through shared memory"


def test_spills_are_seen(gpu_compiler):
    def fn(x, w):
        return product(x, w, num_warps=1)

    assert kernel_resources(fn, struct(128, 64), struct(64, 128), target="a100")["product"].spill_bytes > 0


def test_kernels_of_one_name_and_of_none(gpu_compiler):
    def fn(x, w):
        return product(product(x, w), product(w, w), name="product.last")

    assert set(kernel_resources(fn, struct(128, 64), struct(64, 64))) == {"product", "product_1", "product_last"}
    assert kernel_resources(jnp.matmul, struct(128, 64), struct(64, 64)) == {}


def negate(x):
    def negate_kernel(x_ref, out_ref):
        out_ref[...] = -x_ref[...]

    semantics = mosaic().LoweringSemantics.Warpgroup
    options = mosaic().CompilerParams(lowering_semantics=semantics)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return mosaic().kernel(negate_kernel, out_type=out, grid=(1,), grid_names=("i",), compiler_params=options)(x)


def test_mosaic_kernel(gpu_compiler):
    first = kernel_resources(negate, struct(128, 64))
    assert set(first) == {"negate_kernel"}
    assert first["negate_kernel"].spill_bytes == 0
    assert first["negate_kernel"].registers >= 16
    assert not first["negate_kernel"].tensor_core_instructions
    assert kernel_resources(lambda x: negate(x) + 1, struct(128, 64)) == first, "it is remembered"


def test_mosaic_kernel_compiled_before(gpu_compiler):
    compile_for(negate, struct(128, 128))
    with pytest.raises(RuntimeError, match="before anything else compiles it"):
        kernel_resources(negate, struct(128, 128))
