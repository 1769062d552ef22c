"""Grafana dashboards and alert rules, installed as `ep_rebalance.dashboards`."""
