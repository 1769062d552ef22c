"""Can this machine and this engine run the plugin? Each check returns a `Finding`; none raises.

| module | what it looks at |
|---|---|
| finding | what a check returns, and how one that fails is caught |
| machine | Python, processor, memory, accelerators and their links |
| packages | this package's entry points, and what it builds on |
| settings | a configuration and the paths that it names |
| model | a checkpoint: experts, and whether they can be moved |

What vLLM itself must offer is checked by `ep_rebalance.engines.vllm.diagnosis`.
"""
