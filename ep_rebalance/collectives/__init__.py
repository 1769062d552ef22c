"""The collectives by which ranks agree."""
