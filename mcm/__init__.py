"""Stage two, from a cache to weights: masking, model, targets, training, probing and export."""
