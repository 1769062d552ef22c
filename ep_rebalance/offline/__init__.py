"""The balancer's stages run over load that was recorded or generated, without an engine."""
