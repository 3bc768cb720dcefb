"""Using a trained network: photographs in, masks and overlays out; files for other programs."""
