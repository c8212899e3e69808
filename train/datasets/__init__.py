"""Embedded data sets, as tfds builders: real data on every machine, nothing to download, no TensorFlow."""
