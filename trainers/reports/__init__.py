"""Reports: the folder of a run as one HTML page with charts; no server is asked.

May import the root modules of `trainers`, `trainers.tracking`, `trainers.planning` and `cluster`.
Begin with `run_report.py`, which says what a page shows: it reads with `history.py`, draws with
`charts.py` (primitives in `vega.py`) and writes with `page.py` and the files in `page_parts`.
"""
