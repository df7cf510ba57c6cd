"""icefall_kd: knowledge distillation for small, fast speech recognisers."""

__version__ = "0.1.0"
