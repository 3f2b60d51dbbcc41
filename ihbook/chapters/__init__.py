"""What the chapters share: their settings and the paper's runs (`experiments.py`), the paper's claims (`claims.py`), the columns of
evidence (`evidence.py`), what pages say of them (`pages.py`, `answers.toml`), figures (`plots.py`; `pictures.py` for characters and
patterns; `front.py`), panels that follow controls (`panels.py`, `explore.py`), and sweeps of a chapter over a grid of parameters
(`sweep.py`). `rebuild.py` is for the book's build; `kernel.py` finds the kernel that runs chapters in a
build and in a sweep.
"""
