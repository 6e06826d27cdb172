"""Names of schemes, what they are made of, and what they refuse."""

import dataclasses

import pytest

from dsjax.errors import ConfigError, ParameterError
from dsjax.quantization import SCHEMES, Scheme, scheme
from dsjax.quantization.schemes import variant


def test_names_say_what_a_scheme_is():
    assert all(name == one.name and scheme(name) is one is scheme(one) for name, one in SCHEMES.items())
    assert all(variant(one) is one for name, one in SCHEMES.items() if name[0] != "q")
    assert len({dataclasses.replace(one, name="") for one in SCHEMES.values()}) == len(SCHEMES)
    assert scheme("int4", group_size=64) is SCHEMES["int4_g64"]
    assert scheme("int4", group_size=None) is SCHEMES["int4_channel"]
    assert scheme("int4_g128", symmetric=False) is SCHEMES["int4_asym_g128"]
    assert scheme("int8", symmetric=False, group_size=32) is SCHEMES["int8_asym_g32"]
    assert scheme("int8_g64", group_size=None) is SCHEMES["int8"]
    assert scheme("fp8_tensor", rows=1) is scheme("fp8") is SCHEMES["fp8_e4m3"]
    assert scheme("int4_asym_g32") is SCHEMES["int4_asym"]
    odd = scheme("int4", symmetric=False, group_size=128, scale_dtype="float16")
    assert odd.name == "int4_asym_g128,scale_dtype=float16" and scheme(odd, scale_dtype="bfloat16").name in SCHEMES
    assert scheme("fp6", group_size=64).name == "fp6_g64" and scheme("fp8", rows=64).name == "fp8_e4m3_rows64_channel"


def test_bits_a_weight():
    bits = {name: one.nbytes((4096, 4096)) * 8 / 4096**2 for name, one in SCHEMES.items()}
    wanted = {"q4_0": 4.5, "q8_0": 8.5, "int4": 4.5, "int4_g128": 4.125, "int4_asym": 4.75, "mxfp4": 4.25, "nf4": 4.25}
    assert {name: bits[name] for name in wanted} == wanted
    assert bits["nvfp4"] == pytest.approx(4.5, abs=1e-5) and bits["fp6"] == 6 + 32 / 4096
    assert SCHEMES["fp8_e4m3_block"].nbytes((130, 200)) == 130 * 200 + 4 * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scheme("int5"), "'int5' is unknown; known are: q4_0, .*mxfp4"),
        (lambda: scheme("int4", groups=64), "has no groups to choose"),
        (lambda: scheme("int4", name="mine"), "has no name to choose"),
        (lambda: scheme("nf4", symmetric=False), "'nf4' can not be made asymmetric; int8 and int4 can"),
        (lambda: scheme("q4_1", symmetric=True), "'q4_1' can not be made symmetric"),
        (lambda: scheme("int4", group_size=0), "group_size=0: .* None stands for all"),
        (lambda: scheme("int8", scale_dtype="float64"), "'float64' is unknown; known are: float32"),
        (lambda: Scheme("mine", "int2"), "element 'int2' is unknown; known are: int4"),
    ],
)
def test_wrong_use(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_groups_that_would_divide_are_named():
    with pytest.raises(
        ParameterError, match="groups of 128, .* rows of 576; these would: q4_0, .*int4_channel, int4_g64"
    ):
        SCHEMES["int4_g128"].check((10, 576))
    SCHEMES["fp8_e4m3_block"].check((130, 200))
