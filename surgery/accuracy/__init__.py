"""Accuracy: claims run on real samples, compared with Polygraphy, and said as verdicts."""
