"""What it takes to test this project on a GPU machine that has no network.

`prepare.py` packs loads where there is a network, `__main__.py` runs the steps where there is a GPU.
"""
