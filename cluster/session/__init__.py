"""This machine's session: it has the zygotes, and a Ray that stays warm between commands.

May import `base`, `connection` and `zygote`. Begin with `session.py`, which finds or starts the
session, and `session_server.py`, which is the session. `ray_session.py` connects a driver to Ray.
"""
