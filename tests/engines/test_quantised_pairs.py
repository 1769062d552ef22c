"""The list of quantisation methods and kernels, held against the sources of vLLM that are installed."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from ep_rebalance.config import ConfigurationError, QuantisationConfig
from ep_rebalance.engines.vllm.quantised_pairs import (
    ANY,
    MOE_BACKENDS,
    PAIRS,
    kernel_class,
    pair_of,
    pair_of_layer,
    pair_table,
    pairs_of_method,
    refuse_pair,
)

ROOT = Path(__file__).parents[2]
LAYERS = Path("model_executor") / "layers"


@cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """Of vLLM's layers, by name, in all versions that are here."""
    found: dict[str, list[ast.ClassDef]] = {}
    for file in sources("fused_moe", "quantization"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def sources(*folders: str) -> Iterator[Path]:
    packages = [
        Path(sysconfig.get_path("purelib")) / "vllm",
        *ROOT.glob(".venv/engines/*/vllm"),
    ]
    files = (
        (package / LAYERS / folder).rglob("*.py") for package in packages for folder in folders
    )
    return chain.from_iterable(files)


def bases(name: str) -> set[str]:
    """Names of all classes that it is a subclass of, itself included."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            nodes = classes().get(one, [])
            waiting += [ast.unparse(base).split(".")[-1] for node in nodes for base in node.bases]
    return found


def methods() -> set[str]:
    """Quantisation methods of experts that vLLM makes; what only others inherit from is none."""
    found = {name for name in classes() if "FusedMoEMethodBase" in bases(name)}
    abstract = set().union(*(bases(name) - {name} for name in found))
    return (found - abstract) | {"MoeWNA16Method", "Mxfp4MoEMethod"}


def kernels_of_oracles() -> set[str]:
    """Classes that vLLM chooses from."""
    names = set()
    for file in sources("fused_moe/oracle"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.List):
                names |= {part.id for part in node.value.elts if isinstance(part, ast.Name)}
    return {name for name in names if "FusedMoEExperts" in bases(name)}


def supports_eplb(method: str) -> set[str]:
    """What `supports_eplb` of it and its bases may return, as source text; nothing if it has none."""
    for name in (method, *(bases(method) - {method, "FusedMoEMethodBase"})):
        returned = {
            ast.unparse(part.value)
            for node in classes().get(name, [])
            for function in node.body
            if isinstance(function, ast.FunctionDef) and function.name == "supports_eplb"
            for part in ast.walk(function)
            if isinstance(part, ast.Return) and part.value is not None
        }
        if returned:
            return returned
    return set()


def named(part: str) -> set[str]:
    return {name for pair in PAIRS for name in getattr(pair, part)} - {ANY}


@pytest.mark.skipif(
    not [*ROOT.glob(".venv/engines/vllm-0.33/vllm")],
    reason="some are classes of vLLM 0.33 alone: scripts/setup --engines",
)
def test_each_class_that_is_named_is_one_of_vllms():
    assert named("methods") | named("kernels") | set(MOE_BACKENDS) <= set(classes())
    for name in named("methods"):
        assert "FusedMoEMethodBase" in bases(name), name
    for name in named("kernels"):
        assert "FusedMoEExperts" in bases(name), name


def test_no_method_of_vllm_is_left_out():
    ours = {"FusedMoEModularMethod"}  # around another method, which is the one that counts
    assert methods() - ours <= named("methods")


def test_no_kernel_of_vllm_is_left_out():
    """But those of unquantised experts, and those of methods that stand in the table with any kernel."""
    with_any = {"CutlassExpertsW4A8Fp8", "Mxfp8EmulationTritonExperts", "Mxfp8NativeTritonExperts"}
    unquantised = {name for name in kernels_of_oracles() if "Unquantized" in name or "Bf16" in name}
    assert kernels_of_oracles() - unquantised - {"XPUExperts"} - with_any <= named("kernels")


def test_a_refusal_of_vllm_is_lifted_just_where_it_stands_in_the_way():
    """Where a method supports its balancer with some kernels only, its condition was read."""
    conditional = set()
    for pair in PAIRS:
        for method in pair.methods if pair.verdict == "listed" else ():
            returned = supports_eplb(method)
            if returned <= {"True", "False"}:
                assert pair.lifts_eplb_refusal == ("True" not in returned), pair.name
            else:
                conditional.add(method)
    assert conditional == {
        "CompressedTensorsW4A4Nvfp4MoEMethod",
        "CompressedTensorsWNA16MoEMethod",
    }


def test_entries_do_not_contradict_each_other():
    seen = [(method, kernel) for one in PAIRS for method in one.methods for kernel in one.kernels]
    assert len(set(seen)) == len(seen)
    for pair in PAIRS:
        assert pair.reason
        assert "|" not in pair.reason
        assert not pair.reason.endswith(".")
        assert pair.verdict == "listed" or not pair.lifts_eplb_refusal


@pytest.mark.parametrize(
    ("method", "kernel", "verdict", "lifts"),
    [
        ("Fp8MoEMethod", "TritonOrDeepGemmExperts", "listed", False),
        ("Fp8MoEMethod", "HummingIndexedExperts", "unlisted", False),
        ("Fp8MoEMethod", "TrtLlmFp8ExpertsMonolithic", "refused", False),
        ("CompressedTensorsWNA16MoEMethod", "MarlinExperts", "listed", True),
        ("CompressedTensorsWNA16MoEMethod", "TritonWNA16Experts", "listed", False),
        ("CompressedTensorsWNA16MoEMethod", "CPUExpertsInt4", "unlisted", False),
        ("CompressedTensorsW4A8Int8MoEMethod", "CPUExpertsInt4", "refused", False),
        ("CompressedTensorsW8A8Int8MoEMethod", "TritonExperts", "listed", True),
        ("ModelOptNvFp4FusedMoE", "Nvfp4QuantizationEmulationTritonExperts", "refused", False),
        ("GptOssMxfp4MoEMethod", "MarlinExperts", "refused", False),
        ("UnquantizedFusedMoEMethod", "AiterExperts", "listed", False),
        ("QuarkW8A8Fp8MoEMethod", "TritonExperts", "unlisted", False),
    ],
)
def test_a_pair_is_looked_up(method, kernel, verdict, lifts):
    found = pair_of(method, kernel)
    assert (found.verdict, found.lifts_eplb_refusal) == (verdict, lifts)
    assert found.name == f"{method} with {kernel}"


def test_what_is_not_in_the_table_is_unlisted():
    for pair in (pair_of("NoMethod", "TritonExperts"), pair_of("Fp8MoEMethod", "NoExperts")):
        assert (pair.verdict, pair.reason) == ("unlisted", "never read")


def test_an_unread_kernel_is_told_as_such_with_any_method():
    assert "Humming" in pair_of("NoMethod", "HummingGroupedExperts").reason


def layer_of(method_name: str, *kernels: str, loaded: bool = True) -> SimpleNamespace:
    """A method of that class; its kernel's class derives from the last one of `kernels`."""
    kernel: type = object
    for name in reversed(kernels):
        kernel = type(name, (kernel,), {})
    method = type(method_name, (SimpleNamespace,), {})
    made = SimpleNamespace(fused_experts=kernel()) if loaded else None
    return method(experts_cls=kernel, moe_kernel=made)


def test_a_layer_is_looked_up_before_and_after_its_weights_are_loaded():
    for loaded in (False, True):
        found = pair_of_layer(layer_of("Fp8MoEMethod", "MarlinExperts", loaded=loaded))
        assert (found.name, found.verdict) == ("Fp8MoEMethod with MarlinExperts", "listed")


def test_a_method_and_a_kernel_are_taken_for_their_nearest_bases():
    own = type("OwnMethod", (type(layer_of("Fp8MoEMethod", "X")),), {})
    kernel = layer_of("any", "OwnExperts", "MarlinExperts").experts_cls
    found = pair_of_layer(own(experts_cls=kernel, moe_kernel=None))
    assert (found.name, found.verdict) == ("OwnMethod with OwnExperts", "listed")


def test_a_kernel_that_routes_by_itself_is_refused_whatever_it_is_called():
    found = pair_of_layer(layer_of("Fp8MoEMethod", "OwnExperts", "FusedMoEExpertsMonolithic"))
    assert found.verdict == "refused"


def test_a_method_around_another_is_looked_up_as_that():
    inner = layer_of("Fp8MoEMethod", "TritonExperts", loaded=False)
    around = SimpleNamespace(old_quant_method=inner, moe_kernel=None)
    assert pair_of_layer(around).name == "Fp8MoEMethod with TritonExperts"
    assert kernel_class(around) is inner.experts_cls


def test_a_layer_without_a_kernel_is_unlisted():
    found = pair_of_layer(SimpleNamespace(moe_kernel=None))
    assert (found.name, found.verdict) == ("SimpleNamespace with no kernel", "unlisted")


@pytest.mark.parametrize(
    ("pair", "remedy"),
    [
        (
            ("Fp8MoEMethod", "HummingGroupedExperts"),
            "--moe-backend deep_gemm or flashinfer_cutlass",
        ),
        (("Fp8MoEMethod", "HummingGroupedExperts"), "quantisation.unlisted=self_test"),
        (("NoMethod", "NoExperts"), "or use mode=observe, which moves nothing."),
        (
            ("Any", "Nvfp4QuantizationEmulationTritonExperts"),
            "use mode=observe, which moves nothing.",
        ),
        (("GptOssMxfp4MoEMethod", "MarlinExperts"), "serve it without --plugin ep_rebalance."),
    ],
)
def test_a_refusal_has_the_reason_and_what_can_be_done(pair: tuple[str, str], remedy: str):
    found = pair_of(*pair)
    with pytest.raises(ConfigurationError) as caught:
        refuse_pair(found, QuantisationConfig(), "layer 'x'")
    assert "layer 'x'" in caught.value.reason
    assert f"({found.name}): {found.reason}." in caught.value.reason
    assert remedy in caught.value.remedy


def test_what_is_listed_or_to_be_tried_is_not_refused():
    refuse_pair(pair_of("Fp8MoEMethod", "MarlinExperts"), QuantisationConfig(), "layer 'x'")
    tried = QuantisationConfig(unlisted="self_test")
    refuse_pair(pair_of("NoMethod", "NoExperts"), tried, "layer 'x'")


def test_entries_of_a_method_are_those_that_name_it():
    assert {pair.verdict for pair in pairs_of_method("GptOssMxfp4MoEMethod")} == {"refused"}
    assert pairs_of_method("NoMethod") == ()


def test_the_table_shows_every_entry():
    lines = pair_table().splitlines()
    assert len(lines) == len(PAIRS) + 2
    assert all(line.count("|") == 6 for line in lines)
    assert "`MarlinExperts` (marlin)" in pair_table()
