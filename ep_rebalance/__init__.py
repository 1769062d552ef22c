"""Expert-parallel load balancer for vLLM."""

__version__ = "0.1.0"
