"""Every reader of files from elsewhere, as a fuzzer calls it: bytes in, a value or its own error out.

Files that end in a digest, or have checksums, are given the right ones first, and those of archives are
overlooked at a second try. Or else nothing behind the first check would ever be reached.
"""

import base64
import gzip
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file
from saved_states import PLACEMENT, STATE
from statuses import make_status
from traces import head_of, write_trace

from ep_rebalance.checkpoint import numbers_of, read_checkpoint, weight_size
from ep_rebalance.commands.inspecting import look_into
from ep_rebalance.commands.output import Format, console, write
from ep_rebalance.commands.replay_comparison import compare, read_result
from ep_rebalance.commands.replay_result import SCHEMA_VERSION
from ep_rebalance.commands.status import status_table
from ep_rebalance.config import ConfigurationError
from ep_rebalance.config_sources import load_config, parse_config_argument, read_config_file
from ep_rebalance.diagnosis.model import model
from ep_rebalance.diagnosis.server import read_answer
from ep_rebalance.formats import (
    arrays,
    csv_counts,
    sglang,
    tensorrt_llm,
    trace,
    vllm_answers,
    vllm_ascend,
)
from ep_rebalance.formats.contents import FormatError
from ep_rebalance.formats.format import Reading
from ep_rebalance.formats.load import ForeignLoad
from ep_rebalance.load import state
from ep_rebalance.load.state import save_state
from ep_rebalance.load.trace import TraceError, TraceReader
from ep_rebalance.load.trace.checksums import checksum_of_head
from ep_rebalance.telemetry.metrics import encode

READING = Reading(num_ranks=2, tokens_per_snapshot=2)


@dataclass(frozen=True)
class FileReader:
    """read: of a file with this name. refuses: its own errors; they name the file. seeds: whole files.
    prepared: the bytes that are written, from those of a fuzzer. of_a_file: its errors name it.
    """

    name: str
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...]
    seeds: Callable[[Path], list[bytes]]
    prepared: Callable[[bytes], bytes] = bytes
    of_a_file: bool = True

    def try_out(self, data: bytes, folder: Path) -> None:
        """Raises whatever is not the reader's own error, and AssertionError for one that hides the file."""
        path = folder / self.name
        path.write_bytes(self.prepared(data))
        refusal = self._refusal(path)
        if "Bad CRC-32" in refusal or "another checksum" in refusal:
            with mock.patch.object(zipfile.ZipExtFile, "_update_crc"):
                self._refusal(path)

    def _refusal(self, path: Path) -> str:
        try:
            self.read(path)
        except self.refuses as error:
            named = self.name in str(error) or str(path.parent) in str(error)
            if self.of_a_file and not named:
                raise AssertionError(f"this does not name the file: {error}") from error
            return str(error)
        return ""


def _load(read: Callable[[Path, Reading], ForeignLoad]) -> Callable[[Path], object]:
    """Snapshots are counted only when they are asked for."""
    return lambda path: list(read(path, READING).counts)


def _placement(read: Callable[[Path, Reading], object]) -> Callable[[Path], object]:
    return lambda path: read(path, READING)


def _texts(*texts: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [text.encode() for text in texts]


IDS_TLK = np.arange(48, dtype=np.uint8).reshape(8, 3, 2) % 5


def _tensors(folder: Path) -> list[bytes]:
    """Of counts and ids, in mappings, lists and alone."""
    ids = torch.from_numpy(IDS_TLK)
    held = [{"logical_count": torch.arange(24).view(2, 4, 3)}, {"routed_experts": ids}, [ids], ids]
    for number, value in enumerate(held):
        torch.save(value, folder / f"{number}.pt")
    return [(folder / f"{number}.pt").read_bytes() for number in range(len(held))]


def _arrays(folder: Path) -> list[bytes]:
    np.save(folder / "one.npy", IDS_TLK)
    np.savez(folder / "two.npz", a=IDS_TLK, b=IDS_TLK.astype(np.int64))
    np.savez_compressed(folder / "three.npz", a=IDS_TLK)
    np.savez(folder / "four.npz", rank=0, logical_count=np.arange(12).reshape(4, 3))
    names = ("one.npy", "two.npz", "three.npz", "four.npz")
    return [(folder / name).read_bytes() for name in names]


def _packed(seeds: Callable[[Path], list[bytes]]) -> Callable[[Path], list[bytes]]:
    return lambda folder: [gzip.compress(seed) for seed in seeds(folder)]


def _answers(folder: Path) -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, IDS_TLK)
    choice = {"index": 0, "routed_experts": base64.b64encode(buffer.getvalue()).decode()}
    usage = {"prompt_tokens": 6, "completion_tokens": 3}
    usage["prompt_tokens_details"] = {"cached_tokens": 2}
    answer = json.dumps({"choices": [choice], "usage": usage}).encode()
    return [answer, answer + b"\n" + answer + b"\n"]


def _statistics(path: Path) -> object:
    """The file is that of a rank, in a folder with a right `meta_info.json`."""
    (path.parent / tensorrt_llm.META).write_text('{"num_experts_per_token": 2}')
    return list(tensorrt_llm.read_load(path.parent, READING).counts)


def _meta(path: Path) -> object:
    save_file({"1_0": np.ones(3, np.int64)}, path.parent / "rank0.safetensors")
    return list(tensorrt_llm.read_load(path.parent, READING).counts)


def _rank_file(folder: Path) -> list[bytes]:
    tensors = {f"{i}_{layer}": np.arange(3, dtype=np.int64) for i in (5, 6) for layer in (1, 2)}
    save_file(tensors, folder / "rank0.safetensors")
    return [(folder / "rank0.safetensors").read_bytes()]


def _state_files(folder: Path) -> list[bytes]:
    """Without their digests."""
    save_state(folder / "seed.npz", STATE)
    return [(folder / "seed.npz").read_bytes()[: -state._DIGEST_BYTES]]


def _trace_files(folder: Path) -> list[bytes]:
    old = Path(__file__).parents[1] / "offline" / "version_1.eptrace"
    return [write_trace(folder, head_of(), 3).read_bytes(), old.read_bytes()[:20_000]]


def _with_head_checksum(data: bytes) -> bytes:
    length = int.from_bytes(data[8:16], "little")
    return data[:16] + checksum_of_head(data[24 : 24 + length]).to_bytes(8, "little") + data[24:]


def _read_trace(path: Path) -> object:
    """Whatever checksums its records have."""
    with mock.patch("ep_rebalance.load.trace.reader.checksum_of_record", _its_own):
        list(TraceReader(path))
        _inspected(path)
        return trace.read_placement(path, READING)


def _its_own(record: bytes, version: int) -> int:
    return int.from_bytes(record[8:16], "little")


def _shown(table: object) -> None:
    """As on a terminal, which nothing in a file may command."""
    screen = io.StringIO()
    console(file=screen, width=100).print(table)
    assert "\x1b" not in screen.getvalue()


def _inspected(path: Path) -> None:
    _, table = look_into(path)
    _shown(table)


def _read_answer(path: Path) -> None:
    _shown(status_table(read_answer(path.read_bytes()).status))


def _checkpoint(path: Path) -> None:
    """What commands make of a configuration."""
    checkpoint = read_checkpoint(str(path.parent))
    numbers_of(checkpoint.config)
    weight_size(checkpoint)
    for finding in model(str(path.parent)):
        assert finding.found.isprintable()


def _quantisation(path: Path) -> None:
    (path.parent / "config.json").write_text('{"num_experts": 8, "hidden_size": 64}')
    _checkpoint(path)


def _compared(path: Path) -> object:
    """A result with itself, in every format."""
    shown = compare(read_result(path), read_result(path))
    for form in Format:
        write(shown, form, path.parent / f"shown.{form}")
    return shown


def _results(folder: Path) -> list[bytes]:
    figures = ("imbalance", "balancedness", "step_seconds", "step_time_saved", "stall_seconds")
    sizes = {"ep_size": 4, "redundant_experts": 0, "experts_moved": 3, "bytes_moved": 3000}
    row = {"policy": "ours", **sizes, **dict.fromkeys(figures, 1.5), "plans": {"committed": 1}}
    parts = {"trace": {"steps": 1}, "config": {"planner": {"seed": 0}}, "expert_time": {}}
    whole = {"schema_version": SCHEMA_VERSION, "plugin_version": "0.1.0", **parts, "rows": [row]}
    return [json.dumps(whole).encode()]


READERS = {
    "config": FileReader(
        "config.yaml",
        lambda path: load_config(read_config_file(path)),
        (ConfigurationError,),
        _texts(
            "mode: observe\nwindow: {snapshots: 8}\n",
            "planner:\n  redundant_experts: 4\ndecision: {expert_time_fraction: auto}\n",
            "migration: {max_bytes_per_step: 1048576}\ntrace: {path: /tmp/x, record: false}\n",
        ),
        of_a_file=False,
    ),
    "config-argument": FileReader(
        "config.json",
        lambda path: load_config(parse_config_argument("{" + path.read_bytes().decode("latin-1"))),
        (ConfigurationError,),
        _texts('"mode": "observe"}', '"window": {"snapshots": 8}, "control": {"enabled": true}}'),
        of_a_file=False,
    ),
    "state": FileReader(
        "state.npz",
        _inspected,
        (FormatError, TraceError),
        _state_files,
        lambda content: content + state._digest(content),
    ),
    "trace": FileReader(
        "load.eptrace", _read_trace, (TraceError, FormatError), _trace_files, _with_head_checksum
    ),
    "sglang-load": FileReader(
        "a.json",
        _load(sglang.read_load),
        (FormatError,),
        _texts(
            '{"logical_count": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]}', '{"logical_count": [[1]]}'
        ),
    ),
    "sglang-packed": FileReader(
        "a.json.gz",
        _load(sglang.read_load),
        (FormatError,),
        _packed(_texts('{"logical_count": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]}')),
    ),
    "tensors": FileReader("a.pt", _load(arrays.read_load), (FormatError,), _tensors),
    "csv": FileReader(
        "a.csv",
        _load(csv_counts.read_load),
        (FormatError,),
        _texts("layer,expert,count\n3,0,7\n3,1,9\n5,1,4\n", "0;1;2\n1;0;3\n"),
    ),
    "vllm-answers": FileReader("a.jsonl", _load(vllm_answers.read_load), (FormatError,), _answers),
    "sglang-placement": FileReader(
        "a.json",
        _placement(sglang.read_placement),
        (FormatError,),
        _texts(sglang.placement_text(PLACEMENT, (0, 1, 2), 3)),
    ),
    "tensorrt-llm-placement": FileReader(
        "a.yaml",
        _placement(tensorrt_llm.read_placement),
        (FormatError,),
        _texts(tensorrt_llm.placement_text(PLACEMENT, (1, 2, 4))),
    ),
    "tensorrt-llm-statistics": FileReader(
        "rank0.safetensors", _statistics, (FormatError,), _rank_file
    ),
    "tensorrt-llm-meta": FileReader(
        tensorrt_llm.META, _meta, (FormatError,), _texts('{"num_experts_per_token": 2}')
    ),
    "vllm-ascend": FileReader(
        "a.json",
        _placement(vllm_ascend.read_placement),
        (FormatError,),
        _texts(vllm_ascend.placement_text(PLACEMENT, (0, 1, 5))),
    ),
    "checkpoint": FileReader(
        "config.json",
        _checkpoint,
        (ConfigurationError,),
        _texts(
            '{"architectures": ["A"], "model_type": "m", "num_experts": 8, "num_experts_per_tok": 2, '
            '"num_hidden_layers": 4, "hidden_size": 64, "moe_intermediate_size": 32, '
            '"mlp_only_layers": [0], "decoder_sparse_step": 2, "quantization_config": '
            '{"quant_method": "gptq", "bits": 4, "group_size": 128}}',
            '{"text_config": {"n_routed_experts": [8, 4], "moe_topk": 2, "n_layers": 6, '
            '"first_k_dense_replace": 1, "moe_layer_freq": [0, 1, 1], "layers_block_type": "MEME", '
            '"moe_layers_enum": "1,2,3", "block_configs": [{"block_type": "moe"}]}}',
            '{"num_local_experts": 4, "num_layers": 3, "moe_layer_start_index": [1, 2], '
            '"moe_layer_end_index": -1, "expert_layer_period": 2, "expert_layer_offset": 1, '
            '"compression_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}}',
        ),
    ),
    "checkpoint-quantisation": FileReader(
        "hf_quant_config.json",
        _quantisation,
        (ConfigurationError,),
        _texts('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}'),
    ),
    "server-status": FileReader(
        "status.json",
        _read_answer,
        (ValueError,),
        lambda folder: [encode(make_status())],
        of_a_file=False,
    ),
    "replay-result": FileReader("result.json", _compared, (ValueError,), _results),
    "arrays": FileReader("a.npz", _load(arrays.read_load), (FormatError,), _arrays),
    "arrays-packed": FileReader(
        "a.npz.gz", _load(arrays.read_load), (FormatError,), _packed(_arrays)
    ),
}
"""By the name that `scripts/fuzz --reader` takes."""


def seeds_of(reader: FileReader) -> list[bytes]:
    """Whole files, as its own tests have them."""
    with tempfile.TemporaryDirectory() as folder:
        return reader.seeds(Path(folder))
