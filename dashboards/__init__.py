"""Grafana dashboards as code, alert rules and examples that deploy them, installed as
`ep_rebalance.dashboards`.

`promql.py` writes expressions, `panels.py` and `layout.py` make Grafana's JSON, one module per dashboard
says what is shown; `build.py` writes `grafana/*.json`, which are checked in.
"""
