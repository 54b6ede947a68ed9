"""Programs that run on a cluster's hosts, beside Ray: `python -m cluster.node.NAME`.

Each can be started again at any time, and runs once: a second instance replaces the first, or
does not start where the start commands hold a lock. May import `base` and `connection`.
Begin with `preemption_agent`, which runs on every node; the others run on the head.
"""
