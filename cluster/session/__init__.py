"""This machine's session: a zygote that forks Ray's processes and commands, and a warm Ray.

A zygote is a process that has imported torch, Ray and our engine, and computes nothing. It forks
in milliseconds what would otherwise start Python and import them again. May import `base` and
`connection`. Begin with `session.py`, then `zygote.py`. Where no session can be had, everything
is started as usual.
"""
