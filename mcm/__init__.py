"""Stage two, cache in and weights out: masking, model, targets, training, probing, export."""
