"""Offline: the balancer's stages, run over recorded or generated load, without an engine."""
