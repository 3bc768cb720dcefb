"""Using a trained network: predict.py's masks and overlays, and export.py's files."""
