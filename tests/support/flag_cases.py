"""vLLM's flags that touch experts, parallelism, workers or memory, with the values that matter.

Beside what every trial has (`flag_trials.BASE`): two tensor-parallel ranks, experts spread over them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from flag_trials import MODEL


@dataclass(frozen=True, slots=True)
class Case:
    """flag: as it is typed, with its value. beside: further arguments, without which it means nothing.

    served: a test in tests/server that asks a server with it, and compares what it answers.
    """

    flag: str
    beside: str = ""
    served: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return shlex.split(self.flag)[0].split(".")[0].split("=")[0]

    def words(self) -> list[str]:
        return [word.replace("tiny_moe", MODEL) for word in shlex.split(self.flag)]


def _json(flag: str, **value: object) -> str:
    return f"{flag} {shlex.quote(json.dumps(value))}"


DP = "--tensor-parallel-size 1 --data-parallel-size 2"
LL = f"{DP} --all2all-backend deepep_low_latency"
DCP = '--decode-context-parallel-size 2 --hf-overrides {"num_key_value_heads":1}'
LORA = "--enable-lora --lora-target-modules q_proj o_proj"
DP_TEST = "test_data_parallel_answers_equal_one_rank_without_the_plugin"
TP_TEST = "test_tensor_parallel_answers_do_not_change"

ALL_TO_ALL = (
    "allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", "deepep_v2",
    "flashinfer_all2allv", "flashinfer_nvlink_one_sided", "flashinfer_nvlink_two_sided", "moonep",
    "mori_high_throughput", "mori_low_latency", "naive", "nixl_ep", "pplx",
)  # fmt: skip
MOE_BACKENDS = (
    "auto", "aiter", "b12x", "batched_triton", "cutlass", "deep_gemm", "deep_gemm_mega_moe",
    "flashinfer_cutlass", "flashinfer_moe_ep_cutedsl", "flashinfer_moe_ep_mega_deep_gemm",
    "flashinfer_trtllm", "humming", "marlin", "triton",
)  # fmt: skip
LOAD_FORMATS = (
    "auto", "dummy", "fastsafetensors", "instanttensor", "ipc_cache", "modelexpress",
    "runai_streamer", "runai_streamer_sharded", "sharded_state", "tensorizer", "bitsandbytes", "gguf",
)  # fmt: skip

CASES: Mapping[str, tuple[Case, ...]] = {
    "Experts": (
        Case("--enable-expert-parallel", served=TP_TEST),
        Case("--no-enable-expert-parallel"),
        Case("--enable-eplb"),
        Case("--eplb-config.num_redundant_experts 2"),
        Case("--eplb-config.window_size 100"),
        Case("--eplb-config.log_balancedness true"),
        Case("--expert-placement-strategy round_robin"),
        Case("--enable-ep-weight-filter"),
        *(Case(f"--all2all-backend {name}", DP) for name in ALL_TO_ALL),
        *(Case(f"--moe-backend {name}") for name in MOE_BACKENDS),
        Case("--enable-return-routed-experts"),
        Case(_json("--aux-output-config", enable_return_routed_experts=True)),
        Case("--monokernel"),
        Case(_json("--kernel-config", moe_backend="triton")),
        Case("--enable-flashinfer-autotune"),
    ),
    "Parallelism": (
        Case("--tensor-parallel-size 2", served=TP_TEST),
        Case("--tensor-parallel-size 1"),
        Case("--data-parallel-size 2", "--tensor-parallel-size 1", served=DP_TEST),
        Case("--data-parallel-size 2", served="test_four_ranks_of_tensor_and_data_parallelism_serve"),
        Case("--data-parallel-size 3", "--tensor-parallel-size 1"),
        Case("--pipeline-parallel-size 2", served="test_two_pipeline_stages_answer_as_one_rank"),
        Case("--decode-context-parallel-size 2", '--hf-overrides {"num_key_value_heads":1}'),
        Case("--dcp-comm-backend a2a", DCP),
        Case("--cp-kv-cache-interleave-size 16", DCP),
        Case("--prefill-context-parallel-size 2"),
        Case("--enable-dbo", LL),
        Case("--enable-dbo", DP),
        Case("--ubatch-size 2", LL),
        Case("--dbo-decode-token-threshold 8", LL),
        Case("--dp-sync-interval 4", DP),
        Case("--disable-nccl-for-dp-synchronization", DP),
        Case("--enable-hc-sp"),
        Case("--enable-batch-sharded-sampling"),
        Case("--disable-custom-all-reduce"),
        Case("--enable-elastic-ep", DP),
        Case("--elastic-ep-max-dp-size 4", DP),
        Case("--enable-fault-tolerance", f"{DP} --data-parallel-rank 0"),
        Case("--enable-fault-tolerance", f"{DP} --api-server-count 1"),
        Case(_json("--fault-tolerance-config", engine_recovery_timeout_sec=60), DP),
    ),
    "Nodes, servers and workers": (
        Case("--data-parallel-rank 0", DP),
        Case("--data-parallel-start-rank 1", f"{DP} --data-parallel-size-local 1 --headless"),
        Case("--data-parallel-size-local 1", DP),
        Case("--data-parallel-address 127.0.0.1", DP),
        Case("--data-parallel-rpc-port 13345", DP),
        Case("--data-parallel-backend ray", DP),
        Case("--data-parallel-hybrid-lb", f"{DP} --data-parallel-size-local 1"),
        Case("--data-parallel-external-lb", f"{DP} --data-parallel-rank 0"),
        Case("--data-parallel-multi-port-external-lb", DP),
        Case("--headless", f"{DP} --data-parallel-size-local 1 --data-parallel-start-rank 1"),
        Case("--api-server-count 2", DP,
             served="test_metrics_of_two_api_servers_agree_with_the_status"),
        Case("--nnodes 2"),
        Case("--node-rank 1", "--nnodes 2 --headless"),
        Case("--master-addr 127.0.0.2", "--nnodes 2"),
        Case("--distributed-executor-backend mp"),
        Case("--distributed-executor-backend uni"),
        Case("--distributed-executor-backend ray"),
        Case("--distributed-executor-backend external_launcher"),
        Case("--worker-cls my.Worker"),
        Case("--worker-extension-cls my.Extension"),
        Case("--max-parallel-loading-workers 2"),
        Case("--numa-bind"),
        Case("--device-ids 2,3"),
        Case("--distributed-timeout-seconds 60"),
        Case("--cpu-distributed-timeout-seconds 60"),
        Case("--enable-shm-tensor-arena"),
        Case("--scheduler-cls my.Scheduler"),
        Case(_json("--watchdog-config", timeout=60)),
        Case(_json("--profiler-config", profiler="torch", torch_profiler_dir="/tmp")),
        Case("--enable-layerwise-nvtx-tracing"),
    ),
    "Memory": (
        Case("--gpu-memory-utilization 0.8"),
        Case("--kv-cache-memory-bytes 1G"),
        Case("--kv-cache-dtype fp8"),
        Case("--block-size 32"),
        Case("--no-enable-prefix-caching"),
        Case("--cpu-offload-gb 1"),
        Case("--cpu-offload-params q_proj", "--cpu-offload-gb 1"),
        Case("--offload-backend prefetch", "--offload-group-size 2"),
        Case("--offload-group-size 2"),
        Case("--offload-params q_proj", "--offload-group-size 2"),
        Case("--kv-offloading-size 1"),
        Case("--enable-sleep-mode"),
        Case("--sleep-mode-offload-cudagraph", "--enable-sleep-mode"),
        Case("--sleep-preserve-parameter-names experts", "--enable-sleep-mode"),
        Case("--enable-cumem-allocator"),
        Case("--enable-nccl-comm-suspend", "--enable-sleep-mode"),
        Case("--mamba-cache-mode align"),
    ),
    "Quantisation and weights": (
        *(Case(f"--quantization {name}") for name in
          ("fp8", "fp8_per_block", "fp8_per_tensor", "mxfp8", "nvfp4_per_token", "bitsandbytes",
           "experts_int8", "moe_wna16", "humming", "gguf", "mxfp4", "compressed-tensors")),
        *(Case(f"--load-format {name}") for name in LOAD_FORMATS),
        Case("--safetensors-load-strategy prefetch"),
        Case("--safetensors-load-strategy torchao"),
        Case("--model-impl transformers"),
        Case(_json("--hf-overrides", num_experts=15)),
        Case("--dtype bfloat16"),
        Case("--dtype float32", served=TP_TEST),
        Case("--runner pooling"),
        Case("--skip-tokenizer-init"),
        *(Case(_json("--weight-transfer-config", backend=name)) for name in
          ("nccl", "ipc", "sparse_nccl", "sharded_rdt")),
    ),
    "LoRA": (
        Case("--enable-lora"),
        Case("--lora-target-modules q_proj o_proj", "--enable-lora"),
        Case("--lora-target-modules q_proj experts", "--enable-lora"),
        Case("--lora-target-modules gate_proj up_proj", "--enable-lora"),
        Case("--fully-sharded-loras", LORA),
        Case("--enable-mixed-moe-lora-format", LORA),
        Case("--enable-moe-shared-loras", LORA),
    ),
    "Speculative decoding": (
        Case(_json("--speculative-config", method="ngram", num_speculative_tokens=2)),
        Case(_json("--speculative-config", method="ngram_gpu", num_speculative_tokens=2)),
        Case(_json("--speculative-config", method="suffix", num_speculative_tokens=2)),
        Case(_json("--speculative-config", method="draft_model", model="tiny_moe",
                   num_speculative_tokens=2), served="test_with_a_drafter_answers_are_those_without"),
        Case(_json("--speculative-config", method="mtp", num_speculative_tokens=1)),
    ),
    "KV connectors": (
        *(Case(_json("--kv-transfer-config", kv_connector=name, kv_role="kv_both")) for name in
          ("NixlConnector", "OffloadingConnector", "LMCacheConnectorV1", "ExampleConnector")),
        Case(_json("--kv-events-config", enable_kv_cache_events=True, publisher="zmq")),
        Case(_json("--ec-transfer-config", ec_connector="ECExampleConnector", ec_role="ec_both")),
    ),
    "Scheduling": (
        Case("--async-scheduling"),
        Case("--no-async-scheduling"),
        Case("--no-enable-chunked-prefill"),
        Case("--max-num-batched-tokens 4096"),
        Case("--max-num-seqs 64"),
        Case("--scheduling-policy priority"),
        Case("--prefill-schedule-interval 2"),
        Case("--disable-hybrid-kv-cache-manager"),
    ),
    "Compilation and kernels": (
        Case("--enforce-eager"),
        *(Case(_json("--compilation-config", cudagraph_mode=mode)) for mode in
          ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")),
        *(Case(_json("--compilation-config", mode=mode)) for mode in (0, 1, 2)),
        Case(_json("--compilation-config", pass_config={"fuse_allreduce_rms": True})),
        Case("--optimization-level 0"),
        Case("--optimization-level 3"),
        Case("--cudagraph-capture-sizes 1 2 4"),
        Case("--performance-mode throughput"),
        Case("--attention-backend FLASHINFER"),
        Case("--linear-backend cutlass"),
        Case("--disable-cascade-attn"),
    ),
    "Environment variables": tuple(
        Case(f"{name}={value}", variables={name: value}, beside=beside)
        for name, value, beside in (
            ("VLLM_USE_V2_MODEL_RUNNER", "0", ""),
            ("VLLM_USE_V2_MODEL_RUNNER", "1", ""),
            ("VLLM_ALL2ALL_BACKEND", "deepep_low_latency", DP),
            ("VLLM_MOE_SKIP_PADDING", "0", ""),
            ("VLLM_RANDOMIZE_DP_DUMMY_INPUTS", "1", DP),
            ("VLLM_MOE_USE_DEEP_GEMM", "0", ""),
            ("VLLM_USE_BREAKABLE_CUDAGRAPH", "1", ""),
            ("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1", ""),
        )
    ),
}  # fmt: skip
