"""Which backend runs: by capability, by name, by the environment; and what a refusal says."""

import json
import warnings

import jax
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Gpu, UnsupportedError, capability_of, choose, current_gpu, triton_refusals, tuned

H200 = Gpu("NVIDIA H200", (9, 0), 132)
T4 = Gpu("Tesla T4", (7, 5), 40)


def refusals(gpu, mosaic=("needs bfloat16",)):
    return {"mosaic": list(mosaic), "triton": triton_refusals(gpu), "xla": [], "reference": []}


def described(kind, platform="gpu"):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), (), abstract_device=device))


def test_a_cpu_runs_xla():
    assert current_gpu() is None
    assert choose("op", refusals(None, ()), None) == "xla"


def test_the_gpu_is_the_one_that_is_compiled_for():
    with described("NVIDIA H200"):
        assert current_gpu() == H200
        assert choose("op", refusals(H200), None) == "triton"
    with described("cpu", "cpu"):
        assert current_gpu() is None


def test_the_best_that_can_run_is_taken():
    assert choose("op", refusals(H200, ()), None, H200) == "mosaic"
    assert choose("op", refusals(H200), None, H200) == "triton"


def test_old_gpus_run_xla_and_say_so_once():
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="Tesla T4 is older than compute capability 8.0"):
        assert choose("op", refusals(T4), None, T4) == "xla"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("op", refusals(T4), None, T4)


def test_a_refusal_gives_every_reason():
    with pytest.raises(UnsupportedError, match="op: implementation='mosaic' can not run: needs bf16; page size 16"):
        choose("op", refusals(H200, ("needs bf16", "page size 16")), "mosaic", H200)
    with pytest.raises(UnsupportedError, match="Tesla T4 has compute capability 7.5"):
        choose("op", refusals(T4), "triton", T4)
    with pytest.raises(UnsupportedError, match="'cuda' is unknown; there are .*'triton', 'xla'"):
        choose("op", refusals(H200), "cuda", H200)


@pytest.mark.parametrize(
    ("value", "chosen"), [("xla", "xla"), ("other=xla", "triton"), ("op=reference", "reference"), ("", "triton")]
)
def test_the_environment_overrides_the_default(monkeypatch, value, chosen):
    monkeypatch.setenv("PALLAS_KERNELS", value)
    assert choose("op", refusals(H200), None, H200) == chosen
    assert choose("op", refusals(H200), "triton", H200) == "triton", "an argument wins"


def test_capabilities():
    kinds = ["NVIDIA A100-SXM4-80GB", "NVIDIA A10G", "NVIDIA L4", "NVIDIA L40S", "NVIDIA GH200 480GB", "NVIDIA B200"]
    assert [capability_of(kind) for kind in kinds] == [(8, 0), (8, 6), (8, 9), (8, 9), (9, 0), (10, 0)]


def test_tuned_sizes_come_from_the_table(monkeypatch, tmp_path):
    entries = [{"capability": "9.0", "shape": {"head_dim": 128}, "config": {"splits": 4}}]
    (tmp_path / "op.json").write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    dispatch._table.cache_clear()
    assert tuned("op", H200, head_dim=128) == {"splits": 4}
    assert tuned("op", H200, head_dim=64) == {}
    assert tuned("op", None, head_dim=128) == {}
    assert tuned("unknown", H200, head_dim=128) == {}
    dispatch._table.cache_clear()
