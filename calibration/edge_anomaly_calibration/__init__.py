"""Choice of calibration images, INT8 quantisation, thresholds from normal images, and the INT8-against-float guard."""
