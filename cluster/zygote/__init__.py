"""The zygote: a process that has imported torch and Ray, and forks what would import them again.

It answers requests on a socket with forks of itself, in milliseconds. For a Ray, a stub stands for
Python and hands its processes over. May import `base` and `connection`. Begin with `zygote.py`,
`stub.py` and `forked_child.py`. Where there is no zygote, processes are started as usual.
"""
