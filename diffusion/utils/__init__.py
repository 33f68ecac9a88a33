"""Helpers for all other layers: devices, memory, ranks, texts of errors and checks of arguments."""
