"""Estimators of the negative log-likelihood."""
