"""Sterna: experts, small files of what fine-tuning taught a model."""

__version__ = "0.1.0.dev0"
