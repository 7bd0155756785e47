"""`python -m edge_anomaly_runtime`: the device's commands."""

from .cli import app, run

run(app)
