"""Connections to a cluster: Ray's own, its dashboard over HTTP, and SSH to its nodes.

`ray_internals` has everything that is private to Ray's core, with a test for each item, and the
Ray release in which it was read. May import `base`. Begin with `ray_connection`.
"""
