"""Grafana dashboards as code, alert rules, and examples of how to deploy them. Installed as
`ep_rebalance.dashboards`.

`promql.py` writes expressions, `panels.py` and `layout.py` make Grafana's JSON, and one module per
dashboard says what it shows. `build.py` writes `grafana/*.json`, which are checked in.
"""
