"""Certificates of imported models: how far their numbers are from those of the original."""

from ..utils.modules import importing
from .certificate import FILE, certify, measure, summary, write_certificate

__all__ = ["FILE", "certify", "measure", "summary", "write_certificate"]

__getattr__ = importing(__name__)
