"""What the process that children are forked from imports, once for all of them; much of it would be imported late."""

import lilcom  # noqa: F401
import torch
import torch.utils.tensorboard
import transformers
from transformers.models.hubert.modeling_hubert import HubertModel  # noqa: F401
from transformers.models.whisper.modeling_whisper import WhisperModel  # noqa: F401

import icefall_kd.labels.extract
import icefall_kd.quantization.collect
import icefall_kd.recipe
import icefall_kd.teachers.speech_ssl
import icefall_kd.teachers.whisper  # noqa: F401

transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
