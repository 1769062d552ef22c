"""The loop that ties the stages together."""
