"""Telemetry: what is shown of the balancer, as status, metrics and reports."""
