"""The parser of the command `heliostat`, with the verbs of all packages."""

import argparse


def build_parser() -> argparse.ArgumentParser:
    """Imports the verbs' modules, none of which imports torch, Ray or MLflow."""
    import cluster.cli.files
    import cluster.cli.jobs
    import cluster.cli.lifecycle
    import cluster.cli.session
    import trainers.cli.train
    import tuning.cli.stop
    import tuning.cli.sweep

    top = argparse.ArgumentParser(
        prog="heliostat",
        description="Train PyTorch models on Ray clusters and sweep their hyperparameters, "
        "tracked in MLflow.",
    )
    top.add_argument("--version", action="version", version="heliostat 0.2.0")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    trainers.cli.train.add_verbs(verbs)
    tuning.cli.sweep.add_verbs(verbs)
    cluster.cli.files.add_verbs(verbs)
    cluster.cli.jobs.add_verbs(verbs)
    tuning.cli.stop.add_verbs(verbs)
    cluster.cli.lifecycle.add_verbs(verbs)
    cluster.cli.session.add_verbs(verbs)
    return top
