"""`python -m edge_anomaly`: the same as the console script `edge-anomaly`."""

from .cli import main

main()
