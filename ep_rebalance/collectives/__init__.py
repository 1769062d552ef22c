"""By which ranks agree."""
