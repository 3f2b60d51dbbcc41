"""What the chapters share: their settings and the paper's runs (`experiments.py`), the claims (`claims.py`), the columns of
evidence (`evidence.py`), recorded tables (`recorded.py`), and what pages say of them (`pages.py`, `answers.toml`).

Chapters 11 to 13 have their experiments in `windows.py`, `winners.py` and `scaling.py`. Figures are drawn in `plots.py`;
`pictures.py` draws characters and patterns, `verdict_pictures.py` verdicts, `front.py` the landing page. Panels follow controls
(`panels.py`, `explore.py`), in the built page too (`live`). `sweep.py` runs a chapter over a grid of parameters. `rebuild.py` is
for the book's build, and `kernel.py` finds the kernel that runs chapters in a build and in a sweep.
"""
