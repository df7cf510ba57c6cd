"""What the process that children are forked from imports: once for all of them."""

import torch

import icefall_kd.labels.extract
import icefall_kd.quantization.collect
import icefall_kd.recipe
import icefall_kd.teachers.speech_ssl
import icefall_kd.teachers.whisper  # noqa: F401

torch.set_num_threads(1)
