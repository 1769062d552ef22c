"""Files of other engines: recordings become traces, and placements are read and written.

An entry of `FORMATS` names the module here that reads and writes such files, and does not import it: texts
are made of entries where no file is read. Nothing in a file is executed: no pickles, `yaml.safe_load`,
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ep_rebalance.load.trace_names import SUFFIX

AXES = ("LE", "WLE", "TK", "TLK")
"""What arrays may hold: counts of layers and experts, of windows too; or expert ids by token, layer and place
in the token's top-k. The letters may come in any order.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of file.

    name: on the command line.
    summary: what the files are, a clause without a semicolon.
    module: has `recognises(path) -> bool`, whether an existing file or folder may be one, and these:
    reads_load: `read_load(path, reading) -> ForeignLoad`. Raises FormatError for whatever is wrong.
    reads_placement: `read_placement(path, reading) -> NumberedPlacement`. Raises FormatError for whatever is
        wrong.
    writes_placement: `write_placement(path, placement, moe_layers, writing)`, which replaces a file
        atomically by a placement, given the numbers that its layers have in the model. Raises ValueError for
        what does not fit.
    """

    name: str
    summary: str
    module: str
    reads_load: bool = False
    reads_placement: bool = False
    writes_placement: bool = False


_ENTRIES = (
    Format(
        name="vllm-ascend",
        summary="vllm-ascend's expert map in JSON (expert_map_path)",
        module="ep_rebalance.formats.vllm_ascend",
        reads_placement=True,
        writes_placement=True,
    ),
    Format(
        name="vllm-answers",
        summary="answers of vLLM with routed_experts, JSON or one a line (.jsonl)",
        module="ep_rebalance.formats.vllm_answers",
        reads_load=True,
    ),
    Format(
        name="sglang",
        summary="SGLang's logical_count in JSON, or its --init-expert-location",
        module="ep_rebalance.formats.sglang",
        reads_load=True,
        reads_placement=True,
        writes_placement=True,
    ),
    Format(
        name="tensorrt-llm",
        summary="TensorRT-LLM's folder of expert statistics, or its initial_global_assignments in YAML",
        module="ep_rebalance.formats.tensorrt_llm",
        reads_load=True,
        reads_placement=True,
        writes_placement=True,
    ),
    Format(
        name="arrays",
        summary="counts (logical_count) or expert ids (routed_experts) in .npy, .npz or .pt",
        module="ep_rebalance.formats.arrays",
        reads_load=True,
    ),
    Format(
        name="csv",
        summary="CSV with the columns layer, expert and count (.csv or .tsv)",
        module="ep_rebalance.formats.csv_counts",
        reads_load=True,
    ),
    Format(
        name="state",
        summary="the plugin's own state file",
        module="ep_rebalance.formats.state",
        reads_placement=True,
        writes_placement=True,
    ),
    Format(
        name="trace",
        summary=f"the last placement of a trace (*{SUFFIX})",
        module="ep_rebalance.formats.trace",
        reads_placement=True,
    ),
)

FORMATS: Mapping[str, Format] = MappingProxyType({one.name: one for one in _ENTRIES})
"""By name, in the order in which a file is tried: SGLang's format takes any JSON that is left."""
