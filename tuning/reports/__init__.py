"""The report of a sweep as a page of charts, from the sweep's folder alone.

May import `tuning.trials` and `trainers.reports`. Begin reading with `sweep_report.sweep_page`.
"""
