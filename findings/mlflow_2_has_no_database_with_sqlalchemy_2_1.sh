#!/usr/bin/env bash
# MLflow 2.22.4 beside SQLAlchemy 2.1.9: a client of a SQLite store raises ImportError.
#
# MLflow 2.22.4 accepts `sqlalchemy<3`, so that pip installs 2.1 beside it today. Importing its SQL
# store then asks `sqlalchemy.pool` for FallbackAsyncAdaptedQueuePool, which 2.1 does not have. So
# no store in a database can be opened, and no server starts. With SQLAlchemy below 2.1 both do.
#
# Seen on 2026-11-30 with mlflow 2.22.4, sqlalchemy 2.1.9, Python 3.11:
#   cannot import name 'FallbackAsyncAdaptedQueuePool' from 'sqlalchemy.pool'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'mlflow==2.22.4' 'sqlalchemy==2.1.9'
cd "$folder"
said=$(MLFLOW_TRACKING_URI="sqlite:///$folder/mlflow.db" venv/bin/python -c '
import mlflow
print(mlflow.MlflowClient().search_experiments())' 2>&1 || true)
echo "$said" | tail -n 1 | grep -o "cannot import name 'FallbackAsyncAdaptedQueuePool' from 'sqlalchemy.pool'"
