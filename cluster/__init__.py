"""The machines: specs and their files, the connection to Ray, what the terminal shows.

Nothing in this package imports torch, so that launching, submitting and asking stay instant.
"""
