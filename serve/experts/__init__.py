"""Experts, mixtures and few-shot searches at the door."""
