"""The on-disk format, which both stages read and write byte for byte. It does not import torch."""
