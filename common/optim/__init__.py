"""Optimizers that torch does not have in the form needed here."""
