"""Files of other engines: recordings that become traces, and placements to and fro.

| module | what | reads | writes |
|---|---|---|---|
| sglang | `logical_count` in JSON or `.pt`; `--init-expert-location` | load, placements | placements |
| tensorrt_llm | expert statistics; `initial_global_assignments` in YAML | load, placements | placements |
| vllm_ascend | expert map JSON (`expert_map_path`) | placements | placements |
| token_ids | arrays of expert ids, token by token, `.npz` or `.npy` | load | |

Nothing in a file is executed: no pickles, `yaml.safe_load`, `torch.load(weights_only=True)`.
"""
