"""What the chapters share: the paper's runs and how they are asked for (`experiments.py`), its claims (`claims.py`), figures
(`plots.py`; `pictures.py` for characters and patterns), panels that answer to controls (`panels.py`, `explore.py`), and sweeps of a
chapter over a grid of parameters (`sweep.py`). `rebuild.py` is for the book's build.
"""
