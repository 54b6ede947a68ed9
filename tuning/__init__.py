"""Sweeps: many training runs under Ray Tune, and the command line that composes all verbs."""
