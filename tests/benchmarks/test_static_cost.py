"""benchmarks/static_cost.py: what the compiled GPU kernels cost, held to their bounds. No GPU is needed."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """What static_cost.py finds, in a process where kernels are compiled, not interpreted."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "static_cost.py"

    def costs(targets, *kernels):
        file = tmp_path_factory.mktemp("cost") / "cost.json"
        command = [sys.executable, script, "--json", file, *(f"--target={target}" for target in targets), *kernels]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())

    return costs


SAMPLING = {  # instructions per element of sm_90's path of full blocks: float32, bfloat16
    "uniform": (19, 20),
    "normal": (45, 46),
    "centre": (65, 65),
    "narrow": (65, 65),
    "tail": (100, 100),
    "far": (100, 100),
    "constant": (3, 3),
}


@pytest.mark.long
def test_sampling_full_blocks_on_hopper(costs):
    found = costs(["sm_90"], *(f"{name}: full blocks" for name in SAMPLING))
    for cost in found:
        name = cost["kernel"].partition(":")[0]
        assert cost["local_bytes"] == 0, cost
        assert not cost["fused"], cost
        assert set(cost["stores"]) == {"STG.E.128"}, cost
        if cost["element"] in ("fp32", "bf16"):
            assert cost["per_element"] <= SAMPLING[name][cost["element"] == "bf16"], cost
    assert {cost["kernel"].partition(":")[0] for cost in found} == set(SAMPLING)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_sampling_kernels_compile_for_every_target(target, costs):
    for cost in costs([target], "normal: full blocks"):
        assert not cost["fused"], cost
    for cost in costs([target], "uniform: kernel", "normal: kernel", "tail: kernel", "table lookup"):
        assert cost["local_bytes"] == 0, cost
        assert not cost["fused"] or target == "gfx942", cost  # whose integer division goes through floats
        if cost["kernel"] != "table lookup":
            assert {"buffer_store_dwordx4", "STG.E.128"} & set(cost["stores"]), cost


CLIPPING = {"norm": {"fp32": 5, "bf16": 5, "fp16": 5, "fp64": 8}, "scale": {"fp32": 8, "bf16": 8, "fp16": 8, "fp64": 8}}


@pytest.mark.long
def test_clipping_full_blocks_on_hopper(costs):
    """Instructions per element, all memory moved 128 bits at a time."""
    found = costs(["sm_90"], *(f"{name}: full blocks" for name in CLIPPING))
    assert len(found) == 8
    for cost in found:
        name = cost["kernel"].partition(":")[0]
        assert cost["local_bytes"] == 0, cost
        assert {load.removesuffix(".CONSTANT") for load in cost["loads"]} == {"LDG.E.128"}, cost
        assert set(cost["stores"]) == ({"STG.E.128"} if name == "scale" else {"STG.E.64"}), cost  # a sum
        assert cost["per_element"] <= CLIPPING[name][cost["element"]], cost


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_clipping_kernels_compile_for_every_target(target, costs):
    wanted = ["norm: kernel", "norm: finish", "norm: rescan", "norm: rescan finish", "scale: kernel"]
    wanted += ["norm: rescan per tensor", "norm: per tensor"]
    found = costs([target], *wanted)
    assert {cost["kernel"] for cost in found} == set(wanted)
    for cost in found:
        assert cost["local_bytes"] == 0, cost
        wide = {"buffer_load_dwordx4", "global_load_dwordx4", "LDG.E.128"} & set(cost["loads"])
        assert wide or not cost["kernel"].endswith("kernel"), cost


MADE_OF = {  # matrix products from shared memory and bulk copies both ways, where there are such
    "sm_80": {"HMMA", "LDGSTS"},
    "sm_90": {"HGMMA", "UTMALDG", "UTMASTG"},
    "sm_100": {"UTCHMMA", "UTMALDG", "UTMASTG"},
}
COPIES = {"sm_80": 1, "sm_90": 1, "sm_100": 2}  # of the epilogue: that of a program's last tile stands alone


@pytest.mark.long
@pytest.mark.parametrize("target", MADE_OF)
def test_linear_relu_flags_for_two_instructions(target, costs):
    """An element's flag costs 2 instructions or less, by every tile; nothing is spilled."""
    tiles = {"sm_80": ("128x128", "64x64"), "sm_90": ("128x256", "128x128", "64x128"), "sm_100": ("128x128", "64x128")}
    names = [f"linear_relu {tile}: relu" for tile in tiles[target]]
    found = {(cost["kernel"], cost["element"]): cost for cost in costs([target], *names)}
    for element, name, kind in itertools.product(("bf16", "fp32"), names, (", bias", " squared, bias")):
        plain, flag, maximum = (found[name + kind + more, element] for more in ("", ", flag", ", maximum"))
        for cost in (plain, flag, maximum):
            assert cost["local_bytes"] == 0, cost
            assert {op.split(".")[0] for op in cost["products"]} == MADE_OF[target], cost
            assert cost["copies"] == COPIES[target], cost
        added = (maximum["per_element"] - plain["per_element"]) / COPIES[target]
        assert 0 < added <= 2, (element, name, kind, added)


PRODUCTS = {"sm_80": {"HMMA"}, "sm_100": {"UTCHMMA"}, "gfx942": None}


@pytest.mark.parametrize("target", PRODUCTS)
@pytest.mark.long
def test_linear_relu_for_other_targets(target, costs):
    variants = ("relu, bias, flag", "relu squared, bias, flag")
    names = [f"linear_relu {tile}: {variant}" for tile in ("64x64", "64x128") for variant in variants]
    found = costs([target], *names, "linear_relu backward", "linear_relu pass")
    assert len(found) >= 10  # gfx942 has the passes alone
    for cost in found:
        assert cost["local_bytes"] == 0, cost
        if ", bias" in cost["kernel"]:
            assert PRODUCTS[target] <= {op.split(".")[0] for op in cost["products"]}, cost


@pytest.mark.long
def test_the_flag_kernel_on_hopper(costs):
    """16-byte loads, nothing spilled, and less than the 20 instructions an element that an H100's memory allows."""
    found = costs(["sm_90"], "flag")
    assert len(found) == 8
    for cost in found:
        assert cost["local_bytes"] == 0, cost
        assert "LDG.E.128" in cost["loads"], cost
        if cost["kernel"] == "flag: block":
            assert set(cost["loads"]) == {"LDG.E.128"}, cost
            assert cost["per_element"] <= 10, cost
