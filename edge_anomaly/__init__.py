"""Workstation part: data sets, backbones, detectors, training, evaluation and the full command line."""
